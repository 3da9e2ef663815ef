"""Member pods that were asked to end while their group serves: it turns unready, finishes its requests, and lets them
go. Without a rank it would do nothing, so its pods drain as one.

It stays unready until it is whole again: other groups serve meanwhile, and no budget takes it for one that does. Where
the pods' grace is too short for a request, that waits for the next pod, as after any other loss of a rank.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

LEAVE_SECONDS: Final = 1.0  # between a pod's Leaving and its Release, and before the end of its grace
PROBE_SECONDS: Final = 5.0  # until the kubelet takes an answer of `/readyz` for the truth: the pod's readiness probe


class Departures:
    """`finished` waits until no request runs, `let_go` releases a pod. `lame_duck_seconds`: until every client knows of
    a pod that isn't Ready; 0: there are no such clients."""

    def __init__(
        self, lame_duck_seconds: float, finished: Callable[[], Awaitable[None]], let_go: Callable[[int], None]
    ) -> None:
        self._moving_on = PROBE_SECONDS + lame_duck_seconds if lame_duck_seconds else 0.0
        self._finished, self._let_go = finished, let_go
        self._leaving: set[int] = set()
        self.is_unready = False  # from the first departure until the group is whole again

    @property
    def sentence(self) -> str:
        """Who leaves; empty: nobody."""
        listed = ", ".join(str(pod) for pod in sorted(self._leaving))
        return f"pod{'s' if len(self._leaving) > 1 else ''} {listed} of the group" if listed else ""

    def begin(self, pod: int) -> None:
        """The pod was asked to end, and the group serves."""
        self._leaving.add(pod)
        self.is_unready = True

    def gone(self, pod: int, *, serves: bool) -> None:
        """It has left, or another has taken its place. `serves`: the group does, so that it is whole."""
        self._leaving.discard(pod)
        if serves:
            self.whole()

    def whole(self) -> None:
        """All ranks are in step."""
        self.is_unready = bool(self._leaving)

    async def see_off(self, pod: int, grace_seconds: float) -> None:
        """Let the pod go when nothing runs any more, or when its grace nears its end."""
        most = max(LEAVE_SECONDS, grace_seconds - LEAVE_SECONDS)
        least = min(most, max(LEAVE_SECONDS, self._moving_on)) if pod in self._leaving else LEAVE_SECONDS
        await asyncio.sleep(least)
        if pod in self._leaving:
            try:
                async with asyncio.timeout(most - least):
                    await self._finished()
            except TimeoutError:
                pass
        self._let_go(pod)
