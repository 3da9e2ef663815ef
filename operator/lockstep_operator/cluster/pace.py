"""How fast the API server is asked at most: whatever many models want at once, others are served, too."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


class Pace:
    """`rate` is per second; `burst` requests may come at once after a pause."""

    def __init__(self, rate: float, burst: int, now: Callable[[], float] = time.monotonic) -> None:
        self._interval = 1 / rate
        self._slack = burst * self._interval
        self._now = now
        self._last = float("-inf")  # when the last request was, or will be, by the rate alone

    async def turn(self) -> None:
        """Returns when the next request may be made; in the order of the calls."""
        now = self._now()
        self._last = max(self._last, now - self._slack) + self._interval
        if self._last > now:
            await asyncio.sleep(self._last - now)
