"""Signals that the status has changed, to its sender."""

from __future__ import annotations

import asyncio
import contextlib


class Changes:
    """Quiet changes may wait for others; urgent ones don't."""

    def __init__(self) -> None:
        self._any, self._urgent = asyncio.Event(), asyncio.Event()

    def tell(self, *, urgent: bool = True) -> None:
        self._any.set()
        if urgent:
            self._urgent.set()

    async def next(self, quiet_seconds: float) -> None:
        """Wait for a change; after the last one for so long at least, unless it is urgent."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(quiet_seconds):
                await self._urgent.wait()
        await self._any.wait()
        self._any.clear()
        self._urgent.clear()
