"""The client's end of one sequence: its tokens as they are sampled, or the error that ends it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from lockstep_runtime.engine.client import TokenEvent


class TokenStream(AsyncIterator[TokenEvent]):
    """Iterate it once. Closing or dropping it, or cancelling its reader, calls `cancel`, if it is still open."""

    def __init__(self, request_id: str, cancel: Callable[[], None]) -> None:
        self.request_id = request_id
        self._cancel = cancel
        self._events: asyncio.Queue[TokenEvent | Exception] = asyncio.Queue()
        self._open = True
        self.begun: float | None = None  # monotonic seconds, when it first left the queue

    def push(self, event: TokenEvent) -> None:
        self._events.put_nowait(event)

    def fail(self, error: Exception) -> None:
        """End the stream with this error, after the tokens that were pushed."""
        self._events.put_nowait(error)

    async def __anext__(self) -> TokenEvent:
        if not self._open:
            raise StopAsyncIteration
        try:
            event = await self._events.get()
        except asyncio.CancelledError:
            self.close()
            raise
        if isinstance(event, Exception):
            self._open = False
            raise event
        if event.finish is not None:
            self._open = False
        return event

    async def aclose(self) -> None:
        self.close()

    def close(self) -> None:
        """Stop now; the sequence is cancelled if it is not complete."""
        if self._open:
            self._open = False
            self._cancel()

    def __del__(self) -> None:
        self.close()
