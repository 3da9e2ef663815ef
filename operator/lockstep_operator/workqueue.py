"""Which models to reconcile, and when: each at most once at a time, however often it is asked for.

kopf's own queues are of single objects, and its daemons and timers, which are of models, put finalizers on them.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class WorkQueue(Generic[K]):
    """A set of keys that wait, are being worked on, or are due later.

    A key asked for while it is being worked on is handed out again when that is done: nothing that happened in between
    is missed, and no two workers ever hold the same key. Urgent keys are handed out before all others.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._ready: dict[K, None] = {}  # in order of arrival
        self._urgent: dict[K, None] = {}  # the same, and no key is in both
        self._due: dict[K, float] = {}
        self._order: list[tuple[float, int, K]] = []  # a heap of when keys are due, and of when they were to be before
        self._count = 0
        self._working: dict[K, bool] = {}  # whether it was urgent
        self._again: dict[K, bool] = {}  # the same
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._ready) + len(self._urgent)

    def add(self, key: K, *, urgent: bool = False) -> None:
        """Hand the key out as soon as possible."""
        self._due.pop(key, None)
        if key in self._working:
            self._again[key] = urgent or self._again.get(key, False)
        elif urgent:
            self._ready.pop(key, None)
            self._urgent[key] = None
        elif key not in self._urgent:
            self._ready[key] = None
        self._changed.set()

    def add_after(self, key: K, seconds: float) -> None:
        """Hand the key out so much later, or earlier if that was asked for before."""
        due = self._now() + seconds
        waits = key in self._ready or key in self._urgent
        if not waits and due < self._due.get(key, float("inf")):
            self._due[key] = due
            self._count += 1
            heapq.heappush(self._order, (due, self._count, key))
            self._changed.set()

    async def take(self, *, urgent: bool = False) -> K:
        """The next key, or the next `urgent` one; `done` must follow."""
        while True:
            wait = self._promote()
            if key := next(iter(self._urgent if urgent or self._urgent else self._ready), None):
                self._working[key] = key in self._urgent
                self._urgent.pop(key, None)
                self._ready.pop(key, None)
                return key
            self._changed.clear()
            try:
                async with asyncio.timeout(wait):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def done(self, key: K) -> bool:
        """Whether it was urgent."""
        urgent = self._working.pop(key)
        if key in self._again:
            self.add(key, urgent=self._again.pop(key))
        return urgent

    def _promote(self) -> float | None:
        """Move what is due; return the seconds until the next is."""
        now = self._now()
        while self._order:
            due, _, key = self._order[0]
            if self._due.get(key) == due:
                if due > now:
                    return due - now
                self.add(key)
            heapq.heappop(self._order)
        return None
