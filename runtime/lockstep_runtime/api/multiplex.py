"""Several choices of one request as one sequence of events, with silence noticed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from lockstep_runtime.engine.client import EngineClient, GenerationFailedError, GenerationRequest, TokenEvent

Batch = list[tuple[int, TokenEvent]]


class Multiplexed:
    """Queues all requests at once. Use as an async context: leaving it cancels those that still run."""

    def __init__(self, engine: EngineClient, requests: Sequence[GenerationRequest]) -> None:
        self._engine = engine
        self._requests = requests
        self._pumps: list[asyncio.Task[None]] = []
        self._inbox: Batch = []
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Multiplexed:
        for index, request in enumerate(self._requests):
            self._pumps.append(asyncio.create_task(self._pump(index, request)))
        return self

    async def __aexit__(self, *_: object) -> None:
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def next(self, seconds: float) -> Batch:
        """What came since the last call, waiting up to `seconds` for the first; empty: silence.

        Raises:
            Exception: what the engine raised for any choice, once all that came before it has been taken.
        """
        if not self._inbox and self._error is None:
            await self._news(seconds)
        if not self._inbox and self._error is not None:
            raise self._error
        batch, self._inbox = self._inbox, []
        return batch

    async def _news(self, seconds: float) -> None:
        """A bare timer: this runs for every token, and asyncio.timeout costs four times as much."""
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = loop.call_later(seconds, self._wake)
        try:
            await self._waiter
        finally:
            timer.cancel()
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def cancel(self, index: int) -> None:
        """This choice needs no more tokens."""
        self._pumps[index].cancel()

    async def _pump(self, index: int, request: GenerationRequest) -> None:
        # Cancelled or not, the iterator is only ever left at its own `await`, so that it can clean up by itself.
        finished = False
        try:
            async for event in self._engine.generate(request):
                finished = event.finish is not None
                self._inbox.append((index, event))
                self._wake()
            if not finished:
                raise GenerationFailedError("The engine ended the request before it was complete")
        except Exception as error:  # whatever it is belongs to the request, which is waiting for it
            self._error = error
            self._wake()
