"""Which rung a fault gets. Pure: evidence in, a decision with its reason out.

The ladder: Drop one request, Rebuild the communicator with every process kept, Respawn the processes that can't be used
further. The cheapest rung that can help against the fault comes first. One that has just been tried without a step done
since has failed, and one whose budget is spent is skipped: the next is taken. Above the last the group is poisoned.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from lockstep_runtime.config import Strategy
from lockstep_runtime.protocol.status import Fault
from lockstep_runtime.recovery.diagnosis import Evidence
from lockstep_runtime.recovery.hang_attribution import ranks_text

REBUILDS: Final = 5
REBUILD_REFILL_SECONDS: Final = 5.0  # of healthy time
RESPAWNS: Final = 10
RESPAWN_REFILL_SECONDS: Final = 5.0
PROVEN_SECONDS: Final = 30.0  # a rebuild that held for so long has helped, though nobody asked for a step


class Rung(enum.StrEnum):
    """The steps of the ladder that the group can take by itself."""

    DROP = "Drop"
    REBUILD = "Rebuild"
    RESPAWN = "Respawn"


@dataclass(frozen=True, slots=True)
class Recovery:
    """The decision: `kill` are ranks whose process can't be used further. No rung: the group is poisoned."""

    rung: Rung | None
    kill: tuple[int, ...]
    reason: str


_PROCESS_UNUSABLE: Final = frozenset({Fault.CONTEXT_FAULT, Fault.CORRUPTION})
_NOT_BY_A_STEP: Final = frozenset({Fault.RANK_LOST, Fault.CORRUPTION})
_GARBAGE: Final = frozenset({Fault.CONTEXT_FAULT, Fault.CORRUPTION})


def cheapest(cause: Evidence, evidence: Sequence[Evidence], ranks: int) -> Recovery:
    """The lowest rung that can help against this fault."""
    if cause.fault is Fault.RANK_LOST and cause.rank is not None:
        return Recovery(Rung.RESPAWN, (), f"rank {cause.rank} is gone; its supervisor starts it again")
    if cause.fault in _PROCESS_UNUSABLE:
        found = sorted({one.rank for one in evidence if one.fault is cause.fault and one.rank is not None})
        kill = tuple(found or range(ranks))
        return Recovery(Rung.RESPAWN, kill, f"{cause.fault}: {_whose(kill)} can't be used further")
    if cause.stragglers:
        return Recovery(
            Rung.RESPAWN, cause.stragglers, f"{cause.fault}: the others wait for {_whose(cause.stragglers)}"
        )
    if cause.fault is Fault.HANG:
        return Recovery(Rung.REBUILD, (), "Hang: every rank is aborted; a rank that does not answer is killed")
    return Recovery(Rung.REBUILD, (), f"{cause.fault}: every process lives; a new communicator is made")


def _whose(ranks: Sequence[int]) -> str:
    return f"the process of rank {ranks[0]}" if len(ranks) == 1 else f"the processes of {ranks_text(ranks)}"


@dataclass(slots=True)
class Budget:
    """Attempts that come back with healthy time, one every `refill_seconds`."""

    attempts: int
    refill_seconds: float
    left: float = field(init=False)

    def __post_init__(self) -> None:
        self.left = self.attempts

    def credit(self, seconds: float) -> None:
        self.left = min(float(self.attempts), self.left + max(0.0, seconds) / self.refill_seconds)

    def take(self) -> bool:
        """Whether there was an attempt left to take."""
        if self.left < 1.0:
            return False
        self.left -= 1.0
        return True

    def give_back(self) -> None:
        self.left = min(float(self.attempts), self.left + 1.0)


class RecoveryPolicy:
    """Decides fault by fault. `credit_healthy_time` adds the time between them."""

    def __init__(self, ranks: int, strategy: Strategy) -> None:
        self._ranks, self._strategy = ranks, strategy
        self.rebuilds = Budget(REBUILDS, REBUILD_REFILL_SECONDS)
        self.respawns = Budget(RESPAWNS, RESPAWN_REFILL_SECONDS)
        self.rebuilt_in_vain = False

    def credit_healthy_time(self, seconds: float, *, steps: bool) -> None:
        """The group was formed for so long; `steps`: and has done steps of requests."""
        self.rebuilds.credit(seconds)
        self.respawns.credit(seconds)
        if steps or seconds > PROVEN_SECONDS:
            self.rebuilt_in_vain = False

    def decide(self, cause: Evidence, evidence: Sequence[Evidence], *, by_request: bool = False) -> Recovery:
        """The next rung. `by_request`: a request caused the fault, so the rungs before it did not fail."""
        if cause.final:
            return Recovery(None, (), cause.message)
        first = cheapest(cause, evidence, self._ranks)
        if self._strategy == "RecyclePods":
            return Recovery(None, (), f"{cause.fault}: the strategy is RecyclePods; the group waits for new pods")
        if first.rung is Rung.REBUILD:
            if by_request:
                self.rebuilds.give_back()  # the one that its first fault took
                return first
            return self._rebuild(first, cause)
        return self._respawn(first)

    def charge_respawn(self) -> bool:
        """Charge a process that died or was killed before it was loaded; returns whether there was budget left."""
        return self.respawns.take()

    def _rebuild(self, first: Recovery, cause: Evidence) -> Recovery:
        if self.rebuilt_in_vain:
            why = "a rebuild has just failed to help"
        elif not self.rebuilds.take():
            why = f"{REBUILDS} rebuilds are used up"
        else:
            self.rebuilt_in_vain = True
            return first
        kill = (cause.rank,) if cause.rank is not None else tuple(range(self._ranks))
        return self._respawn(Recovery(Rung.RESPAWN, kill, f"{cause.fault}: {why}; {_whose(kill)} must go"))

    def _respawn(self, wanted: Recovery) -> Recovery:
        if self.respawns.take():
            return wanted
        return Recovery(None, (), f"{RESPAWNS} respawns are used up, and {wanted.reason}")


def invalidates_caches(evidence: Sequence[Evidence]) -> bool:
    """Whether what was computed before such a fault can't be relied on either.

    A step that did not end writes nothing but what it writes again when it is repeated; nor does one in which ranks
    came to differ, since they agreed on every step before it.
    """
    return any(one.fault in _GARBAGE for one in evidence)


def requires_cache_check(evidence: Sequence[Evidence]) -> bool:
    """Whether the caches are to be looked at before they are used again: a NaN may have stood in one."""
    return any(one.fault is Fault.NON_FINITE for one in evidence)


def blame_points(cause: Evidence) -> int:
    """Fault points for the sequences of the step: a lost process is rarely caused by them, the end of its pod never."""
    if cause.planned:
        return 0
    return 1 if cause.outside or cause.fault in _NOT_BY_A_STEP else 2
