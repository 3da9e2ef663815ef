"""Which models to reconcile, and when: each at most once at a time, however often it is asked for.

kopf's own queues are of single objects, and its daemons and timers, which are of models, put finalizers on them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class WorkQueue(Generic[K]):
    """A set of keys that wait, are being worked on, or are due later.

    A key asked for while it is being worked on is handed out again when that is done: nothing that happened in between
    is missed, and no two workers ever hold the same key.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._ready: dict[K, None] = {}  # in order of arrival
        self._due: dict[K, float] = {}
        self._working: set[K] = set()
        self._again: set[K] = set()
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._ready)

    def add(self, key: K) -> None:
        """Hand the key out as soon as possible."""
        self._due.pop(key, None)
        if key in self._working:
            self._again.add(key)
        else:
            self._ready[key] = None
        self._changed.set()

    def add_after(self, key: K, seconds: float) -> None:
        """Hand the key out so much later, or earlier if that was asked for before."""
        due = self._now() + seconds
        if key not in self._ready and due < self._due.get(key, float("inf")):
            self._due[key] = due
            self._changed.set()

    async def take(self) -> K:
        """The next key; `done` must follow."""
        while True:
            wait = self._promote()
            if self._ready:
                key = next(iter(self._ready))
                del self._ready[key]
                self._working.add(key)
                return key
            self._changed.clear()
            try:
                async with asyncio.timeout(wait):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def done(self, key: K) -> None:
        self._working.discard(key)
        if key in self._again:
            self._again.discard(key)
            self.add(key)

    def _promote(self) -> float | None:
        """Move what is due; return the seconds until the next is."""
        now = self._now()
        for key in [key for key, due in self._due.items() if due <= now]:
            self.add(key)
        return min(self._due.values()) - now if self._due else None
