"""One group after a pass (pure): what is known of it, what recovery makes of it, why it doesn't serve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from lockstep_operator.decisions.recovery_policy import RecoveryDecision
from lockstep_operator.groups.facts import GroupFacts
from lockstep_operator.groups.group import Group
from lockstep_operator.groups.group_view import newest_fault
from lockstep_operator.groups.waiting import waiting_for
from lockstep_operator.reporting.blockers import Blocker, find_blocker
from lockstep_operator.types.model_status import Waiting
from lockstep_operator.types.names import FENCED_ANNOTATION
from lockstep_operator.types.reasons import Reason
from lockstep_operator.types.recovery_state import RecoveryState
from lockstep_operator.types.spec import Model
from lockstep_operator.types.timestamps import format_rfc3339
from lockstep_runtime.protocol.status import GroupState, GroupStatus

# What ends without a person or is under way, however long it takes: each has an end of its own.
_MOVING: Final = frozenset(
    {Reason.SCHEDULING_GATED, Reason.LOADING, Reason.RECOVERING, Reason.POISONED, Reason.DRAINING, Reason.GROUPS_FENCED}
)
_NOT_SERVING: Final = frozenset({GroupState.RECOVERING, GroupState.POISONED, GroupState.FAILED})


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupAssessment:
    facts: GroupFacts
    recovery: RecoveryState  # as it is to be remembered
    remedy: str  # what recovery does about it, in a sentence; empty if nothing
    blocker: Blocker  # of a group that serves: what would be in the way
    waiting: Waiting | None  # for the end of what is in the way

    @property
    def group(self) -> Group:
        return self.facts.group

    @property
    def status(self) -> GroupStatus | None:
        """Its report, or its last one."""
        return self.facts.view.status

    @property
    def serves(self) -> bool:
        return serves(self.facts)

    @property
    def accepts(self) -> bool:
        """Whether it takes requests: by its own report, which its first pod's readiness follows."""
        status = self.status
        return self.group.ready if status is None or status.accepting is None else status.accepting

    @property
    def fault(self) -> str:
        """The newest fault's name; of a group that only the status knows, the one that is being repaired."""
        newest = newest_fault(self.status)
        if newest:
            return str(newest.fault)
        known = self.recovery.action.fault if self.recovery.action else ""
        return known or str(self.status.state if self.status else "")


def assess(model: Model, facts: GroupFacts, decided: RecoveryDecision | None, now: float) -> GroupAssessment:
    """`decided` is None where nothing was decided about the group: then its recovery stays as it was."""
    state, remedy = (decided.state, decided.reason) if decided else (facts.last.recovery, "")
    given_up = decided is not None and _needs_a_person(state)
    blocker = find_blocker(facts, remedy, model.tensor_parallel_size, given_up=given_up)
    if facts.group.index in model.intervention.fenced:
        blocker = Blocker(Reason.GROUPS_FENCED, f"group {facts.group.index} is fenced by {FENCED_ANNOTATION}")
    reason = "" if serves(facts) else blocker.reason
    waiting = waiting_for(reason, facts.group, facts.last.waiting, model.progress_deadline, now)
    healing = bool(remedy) and not given_up and (facts.issue is None or facts.issue.heals)
    if waiting and now - waiting.since >= model.progress_deadline and not healing:
        blocker = _overdue(blocker, waiting)
    return GroupAssessment(facts=facts, recovery=state, remedy=remedy, blocker=blocker, waiting=waiting)


def serves(facts: GroupFacts) -> bool:
    """By its pods, which the Service goes by, and by its own report, which is quicker."""
    status = facts.view.status
    return facts.group.ready and not (status and status.state in _NOT_SERVING)


def _needs_a_person(state: RecoveryState) -> bool:
    """The budget is spent, or nothing may be done."""
    return state.stalled or bool(state.action and state.action.dry_run)


def _overdue(blocker: Blocker, waiting: Waiting) -> Blocker:
    """It has been in the way for longer than is allowed."""
    if blocker.stalled or blocker.reason in _MOVING:
        return blocker
    since = format_rfc3339(waiting.since)
    text = f"{blocker.message}; nothing has moved since {since} ({blocker.reason})"
    return Blocker(Reason.PROGRESS_DEADLINE_EXCEEDED, text, stalled=True)
