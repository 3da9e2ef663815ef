"""Which of several operators works: the one that holds a Lease, as with client-go's leader election.

A Lease is another's until its duration has passed since *this* process saw it renewed, by this process' monotonic
clock: clocks that differ do no harm, only clocks that run at another speed would. The holder asks the API server for
nothing any more LEASE_SECONDS - HELD_SECONDS before another may begin.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from lockstep_operator.cluster import lease
from lockstep_operator.cluster.client import Kube, KubeError
from lockstep_operator.cluster.lease import LEASE
from lockstep_operator.types.observed import Object

log = logging.getLogger(__name__)

LEASE_SECONDS: Final = 10  # another operator may begin so long after the last renewal that it saw
HELD_SECONDS: Final = 7.0  # the holder's own count, from before it asked for the renewal
RENEW_SECONDS: Final = 2.0
LOOK_SECONDS: Final = 2.0  # of one that stands by
RETRY_SECONDS: Final = 0.5  # of a renewal that failed
SILENCE_SECONDS: Final = 20.0  # of an API server that doesn't answer one that stands by, until that isn't ready


@dataclass(frozen=True, slots=True)
class Candidate:
    """`identity` is one process' alone, or that of processes of which one begins when the other has ended."""

    namespace: str
    name: str  # of the Lease
    identity: str
    page: str = ""  # where its live page is reached by another


class Election:
    def __init__(
        self,
        kube: Kube,
        candidate: Candidate,
        now: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._kube = kube
        self._candidate = candidate
        self._now = now
        self._wall = wall
        self._until = -math.inf  # this process leads
        self._mine: Object | None = None  # as last written, while it can't be anybody else's
        self._seen: Object | None = None
        self._seen_at = -math.inf
        self._heard_at = now()
        self._trouble = ""

    def leads(self) -> bool:
        return self._now() < self._until

    @property
    def leader(self) -> str:
        """Who holds the Lease, as far as this process has seen."""
        return lease.holder_of(self._seen or {}) or "nobody"

    @property
    def page(self) -> str:
        """Where the holder's live page is reached, as it told; empty if nowhere."""
        return lease.page_of(self._seen or {})

    @property
    def problem(self) -> str:
        """Why this process could not lead if it had to; empty when it could."""
        return self._trouble if self._now() - self._heard_at > SILENCE_SECONDS else ""

    async def won(self) -> None:
        """Wait until this process leads."""
        while True:
            if await self._hold() and self.leads():
                break
            await asyncio.sleep(self._next_look())
        log.info("%s leads, by the Lease %s", self._candidate.identity, self._place)

    async def lost(self) -> str:
        """Renew for as long as that succeeds; returns why it doesn't any more. The process must then end at once."""
        held = True
        while self.leads():
            await asyncio.sleep(RENEW_SECONDS if held else RETRY_SECONDS)
            if self.leads():
                held = await self._hold()
        holder = lease.holder_of(self._seen or {})
        taken = bool(holder) and holder != self._candidate.identity
        return f"{holder} has taken it" if taken else self._trouble or "it was not renewed in time"

    async def resign(self) -> None:
        """Let another begin at once. For one whose work has ended."""
        leads, self._until = self.leads(), -math.inf
        if not leads:
            return
        candidate = self._candidate
        try:
            async with asyncio.timeout(HELD_SECONDS):
                seen = await self._kube.get(LEASE, candidate.namespace, candidate.name)
                if seen is not None and lease.holder_of(seen) == candidate.identity:
                    await self._kube.replace(LEASE, lease.released(seen, self._wall()))
        except (KubeError, TimeoutError) as error:
            log.warning(
                "the Lease %s could not be given back, so another waits until it is over: %s", self._place, error
            )

    async def _hold(self) -> bool:
        """Take or renew the Lease; returns whether it is this process' now."""
        began = self._now()
        try:
            async with asyncio.timeout(HELD_SECONDS):
                mine = await self._written()
        except (KubeError, TimeoutError) as error:
            self._mine = None  # what was written, if anything, is not known
            self._tell(error)
            return False
        self._mine, self._trouble, self._heard_at = mine, "", self._now()
        self._until = began + HELD_SECONDS if mine else -math.inf
        return mine is not None

    async def _written(self) -> Object | None:
        """The Lease, held by this process; None if it is another's."""
        candidate, wall = self._candidate, self._wall()
        seen = self._mine or await self._kube.get(LEASE, candidate.namespace, candidate.name)
        if seen is None:
            first = lease.new(candidate.namespace, candidate.name, candidate.identity, LEASE_SECONDS, wall)
            return await self._kube.create(LEASE, lease.with_page(first, candidate.page))
        if not self._may_be_taken(seen):
            return None
        mine = lease.held(seen, candidate.identity, LEASE_SECONDS, wall)
        return await self._kube.replace(LEASE, lease.with_page(mine, candidate.page))

    def _next_look(self) -> float:
        """Seconds: not later than at the moment when another's Lease is over."""
        over = self._seen_at + lease.seconds_of(self._seen or {}) - self._now()
        return min(LOOK_SECONDS, max(over, RETRY_SECONDS))

    def _may_be_taken(self, seen: Object) -> bool:
        now = self._now()  # once it has been seen, however long that took
        if self._seen is None or not lease.is_same(seen, self._seen):
            self._seen, self._seen_at = seen, now
        holder = lease.holder_of(seen)
        return holder in ("", self._candidate.identity) or now - self._seen_at >= lease.seconds_of(seen)

    def _tell(self, error: Exception) -> None:
        """Once. That another was faster is no trouble: the next look shows who holds it."""
        if isinstance(error, KubeError) and error.status == 409:
            self._heard_at = self._now()
            return
        trouble = f"the Lease {self._place} can't be read or written: {str(error) or 'no answer from the API server'}"
        if trouble != self._trouble:
            log.warning("%s", trouble)
        self._trouble = trouble

    @property
    def _place(self) -> str:
        return f"{self._candidate.namespace}/{self._candidate.name}"
