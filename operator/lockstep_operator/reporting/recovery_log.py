"""Faults and repairs, told once each though operators come and go (pure).

Groups number their faults; the highest number that was told stands in the status. What happened while no operator was
there is therefore told when the next one is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from lockstep_operator.decisions.fault_detection import matches
from lockstep_operator.groups.group_view import block_of
from lockstep_operator.types.recovery_state import RecoveryState, Rung, from_status
from lockstep_operator.types.timestamps import format_rfc3339, parse_rfc3339
from lockstep_runtime.protocol.status import FaultRecord, GroupStatus

DROPPED: Final = "Drop"
FIRST_TOKEN_SECONDS: Final = 10.0  # a repair is told without its first token when that hasn't come by then


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """A fault that a group was healed from. Times are unix seconds, phases seconds."""

    group: int
    fault: str
    rank: int | None
    rung: str
    noticed: float
    finished: float
    phases: Mapping[str, float] = field(default_factory=dict)
    resumed: int = 0
    counted: bool = True  # by the group itself

    @property
    def sentence(self) -> str:
        who = f"group {self.group}" if self.rank is None else f"group {self.group} rank {self.rank}"
        parts = ", ".join(f"{name} {seconds:.2g} s" for name, seconds in self.phases.items())
        went_on = f"; {self.resumed} request{'s' * (self.resumed > 1)} went on" if self.resumed else ""
        return f"{who} was healed from {self.fault} by {self.rung}{f' ({parts})' if parts else ''}{went_on}"


def new_faults(old: Mapping[str, Any], said: Sequence[GroupStatus]) -> Iterator[tuple[GroupStatus, FaultRecord]]:
    """Faults that the status doesn't tell of yet, in order."""
    for status in said:
        known = _reported(old, status, "lastFaultID")
        for fault in sorted(status.faults, key=lambda fault: fault.id):
            if fault.id > known:
                yield status, fault


def completed_repairs(
    old: Mapping[str, Any], said: Sequence[GroupStatus], memories: Mapping[int, RecoveryState], now: float
) -> Iterator[tuple[GroupStatus, FaultRecord]]:
    """Repairs by the groups themselves that the status doesn't tell of yet, in order. One that only a step of the
    operator made possible is that step's to tell."""
    for status in said:
        known, plan = _reported(old, status, "lastRepairID"), memories.get(status.group, RecoveryState()).plan
        for fault in _repaired(status, now):
            if fault.rung == DROPPED:  # a request was refused: nobody was ill
                continue
            if fault.id > known and not (plan and matches(plan.trigger, status, fault) and not plan.dry_run):
                yield status, fault


def last_fault_id(old: Mapping[str, Any], status: GroupStatus) -> int:
    return max([_reported(old, status, "lastFaultID"), *(fault.id for fault in status.faults)])


def last_repair_id(old: Mapping[str, Any], status: GroupStatus, now: float) -> int:
    return max([_reported(old, status, "lastRepairID"), *(fault.id for fault in _repaired(status, now))])


def operator_repairs(
    old: Mapping[str, Any], said: Sequence[GroupStatus], memories: Mapping[int, RecoveryState], now: float
) -> Iterator[Repair]:
    """Steps of the operator after which the group serves again, as of this pass."""
    for group, memory in sorted(memories.items()):
        plan, known = memory.plan, from_status(block_of(old, group).get("recovery")).plan
        if plan is None or not plan.healed or plan.dry_run or known is None or known.healed:
            continue
        closed = next(
            (fault for status in said for fault in _closed(status) if matches(plan.trigger, status, fault)), None
        )
        took = {"detect": max(0.0, plan.since - plan.noticed), "recycle": max(0.0, now - plan.since)}
        yield Repair(
            group=group,
            fault=plan.fault,
            rank=plan.rank,
            rung=str(plan.rung),
            noticed=plan.noticed,
            finished=math.ceil(now),
            phases={**(closed.phases if closed else {}), **took},
            resumed=closed.requests_resumed if closed else 0,
            counted=closed is not None,
        )


def repair_of(group: int, fault: FaultRecord) -> Repair:
    return Repair(
        group=group,
        fault=str(fault.fault),
        rank=fault.rank,
        rung=fault.rung,
        noticed=fault.at,
        finished=fault.recovered_at or fault.at,
        phases=fault.phases,
        resumed=fault.requests_resumed,
    )


def last_recovery(
    old: Mapping[str, Any], said: Sequence[GroupStatus], by_operator: Sequence[Repair]
) -> dict[str, Any] | None:
    """As `status.lastRecovery`: the newest of all. A known one is told anew, for its first token; but a step of the
    operator stays what helped, though the group tells of the same repair."""
    known: dict[str, Any] | None = old.get("lastRecovery")
    own = [repair_of(status.group, fault) for status in said for fault in _closed(status) if fault.rung != DROPPED]
    newest = max([*by_operator, *own], key=lambda repair: repair.finished, default=None)
    if newest is None:
        return known
    if known and parse_rfc3339(known["finishedAt"]) - newest.finished > (-1.0 if known["rung"] in list(Rung) else 0.0):
        return known
    return {
        "fault": newest.fault,
        "group": newest.group,
        "suspectRank": newest.rank,
        "rung": newest.rung,
        "phases": {name: round(seconds, 3) for name, seconds in newest.phases.items()},
        "requestsResumed": newest.resumed,
        "finishedAt": format_rfc3339(newest.finished),
    }


def _reported(old: Mapping[str, Any], status: GroupStatus, name: str) -> int:
    block = block_of(old, status.group)
    return int(block.get(name, 0)) if block.get("incarnation") == status.incarnation else 0


def _closed(status: GroupStatus) -> list[FaultRecord]:
    return sorted((fault for fault in status.faults if fault.recovered_at is not None), key=lambda fault: fault.id)


def _repaired(status: GroupStatus, now: float) -> list[FaultRecord]:
    """By rising number. The newest is left out while its first token is still to come."""
    done = _closed(status)
    if not done:
        return []
    newest = done[-1]
    awaited = newest.requests_resumed > 0 and "firstToken" not in newest.phases
    young = now - (newest.recovered_at or now) < FIRST_TOKEN_SECONDS
    return done[:-1] if awaited and young else done
