"""Faults and repairs, reported once each though operators come and go (pure).

Groups number their faults; the highest number that was reported stands in the status. What happened while no operator
was there is therefore reported when the next one is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from lockstep_operator.decisions.fault_detection import matches
from lockstep_operator.reporting.assessment import GroupAssessment
from lockstep_operator.types.model_status import GroupSummary, LastRecovery
from lockstep_operator.types.observed import Pod
from lockstep_operator.types.recovery_state import RecoveryAction, Rung
from lockstep_runtime.protocol.status import FaultRecord, GroupStatus

DROPPED: Final = "Drop"
FIRST_TOKEN_SECONDS: Final = 10.0  # a repair is reported without its first token when that hasn't come by then


@dataclass(frozen=True, slots=True)
class NewFault:
    """One that the status doesn't know yet, and the pod whose rank it is laid to, if that is still there."""

    group: int
    incarnation: str
    record: FaultRecord
    pod: Pod | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """A part of what the operator did. Times are unix seconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """A fault that a group was healed from. Times are unix seconds, phases seconds. `steps`: of the operator's repair;
    `record`: the group's own of the fault that it answered, where that outlived the repair."""

    group: int
    fault: str
    rank: int | None
    rung: str
    noticed: float
    finished: float
    phases: Mapping[str, float] = field(default_factory=dict)
    resumed: int = 0
    counted: bool = True  # by the group itself
    steps: tuple[Step, ...] = ()
    record: FaultRecord | None = None

    @property
    def sentence(self) -> str:
        who = f"group {self.group}" if self.rank is None else f"group {self.group} rank {self.rank}"
        parts = ", ".join(f"{name} {seconds:.2g} s" for name, seconds in self.phases.items())
        resumed = f"; {self.resumed} request{'s' * (self.resumed > 1)} resumed" if self.resumed else ""
        return f"{who} recovered from {self.fault} by {self.rung}{f' ({parts})' if parts else ''}{resumed}"


def new_faults(one: GroupAssessment) -> list[NewFault]:
    """By rising number."""
    status = one.facts.reported
    if status is None:
        return []
    known = _same_process(one.facts.last, status).last_fault_id or 0
    found = sorted((fault for fault in status.faults if fault.id > known), key=lambda fault: fault.id)
    return [NewFault(status.group, status.incarnation, fault, _pod_of(one, status, fault)) for fault in found]


def _pod_of(one: GroupAssessment, status: GroupStatus, fault: FaultRecord) -> Pod | None:
    """None where a pod has taken the place of the one that had the fault: it is known by its age."""
    index = next((rank.pod_index for rank in status.ranks if rank.rank == fault.rank), None)
    return next((pod for pod in one.group.pods if pod.index == index and pod.created <= fault.at), None)


def completed_repairs(one: GroupAssessment, now: float) -> Iterator[Repair]:
    """By the group itself, that the status doesn't know yet, by rising number. One that only a step of the operator
    made possible is that step's to report."""
    status, action = one.facts.reported, one.recovery.action
    if status is None:
        return
    known = _same_process(one.facts.last, status).last_repair_id or 0
    for fault in _repaired(status, now):
        helped = action is not None and not action.dry_run and matches(action.trigger, status, fault)
        if fault.rung != DROPPED and fault.id > known and not helped:  # dropped: a request was refused, nothing failed
            yield _repair(status.group, fault)


def operator_repair(one: GroupAssessment, now: float) -> Repair | None:
    """A step of the operator after which the group serves again, as of this pass."""
    action, known = one.recovery.action, one.facts.last.recovery.action
    if action is None or not action.healed or action.dry_run or known is None or known.healed:
        return None
    status = one.facts.reported
    closed = next((fault for fault in _closed(status) if status and matches(action.trigger, status, fault)), None)
    took = {"detect": max(0.0, action.since - action.noticed), "recycle": max(0.0, now - action.since)}
    return Repair(
        group=one.group.index,
        fault=action.fault,
        rank=action.rank,
        rung=str(action.rung),
        noticed=action.noticed,
        finished=math.ceil(now),
        phases={**(closed.phases if closed else {}), **took},
        resumed=closed.requests_resumed if closed else 0,
        counted=closed is not None,
        steps=steps_of(action, one.group.pods, now),
        record=closed,
    )


def steps_of(action: RecoveryAction, pods: Sequence[Pod], now: float) -> tuple[Step, ...]:
    """`delete` ends when the new pods are made, `start` when their containers run, `load` when the group serves."""
    new = [pod for pod in pods if pod.created >= math.floor(action.since)]
    begun = [pod.started for pod in new if pod.started is not None]
    ends = {
        "detect": action.since,
        "delete": max((pod.created for pod in new), default=action.since),
        "start": max(begun, default=action.since),
        "load": now,
    }
    steps, at = [], action.noticed
    for name, end in ends.items():
        steps.append(Step(name, at, at := min(max(at, end), max(at, now))))
    return tuple(steps)


def last_ids(last: GroupSummary, status: GroupStatus, now: float) -> tuple[int, int]:
    """Of the newest fault and the newest repair that are reported after this pass."""
    known = _same_process(last, status)
    faults = max([known.last_fault_id or 0, *(fault.id for fault in status.faults)])
    return faults, max([known.last_repair_id or 0, *(fault.id for fault in _repaired(status, now))])


def recoveries_since(last: GroupSummary, status: GroupStatus) -> int:
    """That are not counted in the status yet: a new process counts from 0 again."""
    counted = _same_process(last, status).recoveries or 0
    return status.recoveries - counted if status.recoveries >= counted else status.recoveries


def last_recovery(
    known: LastRecovery | None, groups: Sequence[GroupAssessment], by_operator: Sequence[Repair]
) -> LastRecovery | None:
    """The newest of all. A known one is written again, for its first token; but a step of the operator remains,
    though the group reports the same repair."""
    own = [
        _repair(one.status.group, fault)
        for one in groups
        if one.status
        for fault in _closed(one.status)
        if fault.rung != DROPPED
    ]
    newest = max([*by_operator, *own], key=lambda repair: repair.finished, default=None)
    if newest is None:
        return known
    if known and known.finished_at - newest.finished > (-1.0 if known.rung in list(Rung) else 0.0):
        return known
    return LastRecovery(
        fault=newest.fault,
        group=newest.group,
        suspect_rank=newest.rank,
        rung=newest.rung,
        phases={name: round(seconds, 3) for name, seconds in newest.phases.items()},
        requests_resumed=newest.resumed,
        finished_at=newest.finished,
    )


def _repair(group: int, fault: FaultRecord) -> Repair:
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


def _same_process(last: GroupSummary, status: GroupStatus) -> GroupSummary:
    """What the status has counted of this very process; nothing, of another."""
    return last if last.incarnation == status.incarnation else GroupSummary(group=status.group)


def _closed(status: GroupStatus | None) -> list[FaultRecord]:
    faults = status.faults if status else ()
    return sorted((fault for fault in faults if fault.recovered_at is not None), key=lambda fault: fault.id)


def _repaired(status: GroupStatus, now: float) -> list[FaultRecord]:
    """By rising number. The newest is left out while its first token is still to come."""
    done = _closed(status)
    if not done:
        return []
    newest = done[-1]
    awaited = newest.requests_resumed > 0 and "firstToken" not in newest.phases
    young = now - (newest.recovered_at or now) < FIRST_TOKEN_SECONDS
    return done[:-1] if awaited and young else done
