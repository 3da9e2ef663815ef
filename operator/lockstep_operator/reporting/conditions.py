"""The conditions of a model (pure): Ready means "as the spec asks", Available means "somebody answers"."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from lockstep_operator.decisions.planner import Decision
from lockstep_operator.decisions.recovery_policy import RecoveryDecision
from lockstep_operator.decisions.rollout import RolloutStep
from lockstep_operator.groups import group_view
from lockstep_operator.groups.group import Group
from lockstep_operator.groups.group_view import GroupView
from lockstep_operator.groups.pod_issues import PodIssue
from lockstep_operator.groups.process_failures import ProcessFailure
from lockstep_operator.groups.waiting import Waiting
from lockstep_operator.types.spec import Model
from lockstep_operator.types.timestamps import format_rfc3339
from lockstep_runtime.protocol.status import GroupState, GroupStatus

MESSAGE_LIMIT: Final = 2000
# What ends without a person or is under way, however long it takes: each has an end of its own.
_MOVING: Final = frozenset({"SchedulingGated", "Loading", "Recovering", "Poisoned", "Draining"})
_NOT_SERVING: Final = frozenset({GroupState.RECOVERING, GroupState.POISONED, GroupState.FAILED})


@dataclass(frozen=True, slots=True)
class ConditionValue:
    """One condition's answer. `stalled` says that it won't mend itself."""

    status: str
    reason: str
    message: str
    stalled: bool = False


@dataclass(frozen=True, slots=True)
class Obstacle:
    """What keeps the operator itself from doing what the spec asks."""

    reason: str
    message: str
    stalled: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupAssessment:
    """A group from outside and from inside. `overdue`: it has waited for the same thing longer than is allowed."""

    group: Group
    voice: GroupView
    trouble: PodIssue | None
    verdict: RecoveryDecision | None = None
    complaint: ProcessFailure | None = None
    waiting: Waiting | None = None
    overdue: bool = False

    @property
    def remedy(self) -> str:
        """What recovery does about it, in a sentence; empty if nothing."""
        return self.verdict.reason if self.verdict else ""

    @property
    def healing(self) -> bool:
        """Whether the operator has a step under way, or to come, for what is wrong."""
        if self.verdict is None or not self.remedy or self.given_up:
            return False
        return self.trouble is None or self.trouble.heals

    @property
    def given_up(self) -> bool:
        """Whether it needs a person: the budget is spent, or nothing may be done."""
        memory = self.verdict.memory if self.verdict else None
        return memory is not None and (memory.stalled or bool(memory.plan and memory.plan.dry_run))


def conditions(
    model: Model,
    decision: Decision,
    views: Sequence[GroupAssessment],
    obstacle: Obstacle | None,
    old: Mapping[str, Any],
) -> dict[str, ConditionValue]:
    """By type. `old` is the status as last written."""
    ready = _ready(model, decision, views, obstacle, old)
    working = ready.status != "True"
    return {
        "Ready": ready,
        "Available": _available(model, views),
        "ModelLoaded": _model_loaded(model, views, old),
        "CollectivesHealthy": _collectives(model, views),
        "Poisoned": _poisoned(views),
        "Reconciling": _flag(working and not ready.stalled, ready, *_at_rest(ready)),
        "Stalled": _flag(working and ready.stalled, ready, "NotStalled", "nothing waits for a person"),
    }


def render(
    findings: Mapping[str, ConditionValue], generation: int, old: Iterable[Mapping[str, Any]], now: float
) -> list[dict[str, Any]]:
    """As the API wants them; a condition whose status stays keeps its time."""
    before = {condition["type"]: condition for condition in old}
    return [
        {
            "type": name,
            "status": finding.status,
            "reason": finding.reason,
            "message": finding.message[:MESSAGE_LIMIT],
            "observedGeneration": generation,
            "lastTransitionTime": (
                before[name]["lastTransitionTime"]
                if name in before and before[name]["status"] == finding.status
                else format_rfc3339(now)
            ),
        }
        for name, finding in findings.items()
    ]


def explain(view: GroupAssessment, size: int) -> ConditionValue:
    """Why a group isn't Ready."""
    finding = _with_complaint(view, _explained(view, size))
    if not view.overdue or finding.stalled or finding.reason in _MOVING or view.healing:
        return finding
    since = f" since {format_rfc3339(view.waiting.since)}" if view.waiting else ""
    words = f"{finding.message}; nothing has moved{since} ({finding.reason})"
    return ConditionValue("False", "ProgressDeadlineExceeded", words, stalled=True)


def _with_complaint(view: GroupAssessment, finding: ConditionValue) -> ConditionValue:
    """What its pods complain of is the likely reason why it doesn't come up."""
    complaint = view.complaint
    if complaint is None or complaint.message in finding.message:
        return finding
    vague = finding.reason in ("Starting", "Loading", "Unreachable")
    words = f"{complaint.message}; {finding.message}" if vague else f"{finding.message}; {complaint.message}"
    return replace(finding, reason=complaint.reason if vague else finding.reason, message=words)


def _explained(view: GroupAssessment, size: int) -> ConditionValue:
    group, status, name = view.group, view.voice.status, f"group {view.group.index}"
    if view.trouble:
        words = "; ".join(part for part in (view.trouble.message, view.remedy if view.trouble.heals else "") if part)
        return ConditionValue("False", view.trouble.reason, words, view.given_up and view.trouble.heals)
    if not group.exists or group.deleting:
        return ConditionValue("False", "Starting", f"{name} is being made")
    if group.strays and not group.pods:
        return ConditionValue(
            "False", "Starting", f"{name} waits until {group.strays} older pods of the same names have ended"
        )
    if status is None:
        running = sum(pod.phase == "Running" and pod.deleting is None for pod in group.pods)
        words = (
            view.voice.unreachable_reason
            or f"{running} of {group.wanted} pods of {name} run; its first pod hasn't reported yet"
        )
        words = "; ".join(part for part in (words, view.remedy) if part)
        return ConditionValue(
            "False", "Unreachable" if view.voice.unreachable_reason else "Starting", words, view.given_up
        )
    if group_view.failed_ranks(status) or status.state is GroupState.FAILED:
        return ConditionValue(
            "False", "ModelLoadFailed", f"{name}: {_load_failure(status)}", stalled=not status.may_pass
        )
    if status.state is GroupState.POISONED:
        return _unhealed(view, status, name)
    if view.remedy and status.state in (GroupState.READY, GroupState.RECOVERING):  # for too long, by its own words
        return ConditionValue(
            "False", "RecoveryExhausted" if view.given_up else "Recovering", view.remedy, view.given_up
        )
    if view.remedy and view.given_up:  # a late try is under way: until it has helped, it needs a person
        return ConditionValue("False", "RecoveryExhausted", view.remedy, stalled=True)
    return _by_state(status, name, size)


def _unhealed(view: GroupAssessment, status: GroupStatus, name: str) -> ConditionValue:
    """Progress, as long as the operator has a remedy."""
    words = view.remedy or f"{name} can't serve and can't heal itself{f': {status.message}' if status.message else ''}"
    reason = "RecoveryExhausted" if view.given_up else "Poisoned"
    return ConditionValue("False", reason, words, view.given_up)


def _by_state(status: GroupStatus, name: str, size: int) -> ConditionValue:
    words = f": {status.message}" if status.message else ""
    match status.state:
        case GroupState.RECOVERING:
            return ConditionValue("False", "Recovering", f"{name} recovers{words}")
        case GroupState.DRAINING:
            return ConditionValue("False", "Draining", f"{name} finishes its requests{words}")
        case GroupState.LOADING if group_view.loaded(status, size):
            return ConditionValue("False", "Loading", status.message or f"{name} holds its weights")
        case GroupState.LOADING:
            return ConditionValue("False", "Loading", f"{name} has read {group_view.progress(status)} % of its weights")
        case GroupState.READY:
            return ConditionValue(
                "False", "Starting", f"{name} has joined its {size} ranks and is about to take requests"
            )
        case _:
            return ConditionValue("False", "Starting", f"{name} waits for its {size} ranks{words}")


def _load_failure(status: GroupStatus) -> str:
    failed = group_view.failed_ranks(status)
    worded = [rank for rank in failed if rank.message]
    return (
        f"rank {worded[0].rank} can't load the model: {worded[0].message}"
        if worded
        else (status.message or "the model can't be loaded")
    )


def _ready(
    model: Model,
    decision: Decision,
    views: Sequence[GroupAssessment],
    obstacle: Obstacle | None,
    old: Mapping[str, Any],
) -> ConditionValue:
    if decision.conflict:
        return ConditionValue("False", "NameConflict", decision.conflict, stalled=not decision.conflict_ends)
    if obstacle:
        return ConditionValue("False", obstacle.reason, obstacle.message, stalled=obstacle.stalled)
    if decision.excess:
        listed = ", ".join(str(group.index) for group in decision.excess)
        return ConditionValue("False", "ScalingDown", f"group {listed} finishes its requests and is removed")
    if model.replicas == 0:
        return ConditionValue("True", "ScaledToZero", "replicas is 0: nothing is served, as asked")
    behind = [view for view in views if not (serves(view) and view.group.ready_at(decision.revision))]
    if not behind:
        return ConditionValue("True", "Ready", f"{_groups(len(views))} of {model.tensor_parallel_size} ranks serve")
    return _not_ready(model, decision, behind, old)


def _not_ready(
    model: Model, decision: Decision, behind: Sequence[GroupAssessment], old: Mapping[str, Any]
) -> ConditionValue:
    current = [view for view in behind if not serves(view)]  # the others serve, with an older revision
    findings = [explain(view, model.tensor_parallel_size) for view in current]
    worst = next((finding for finding in findings if finding.stalled), findings[0] if findings else None)
    waiting = [turn.reason for turn in decision.turns if turn.step in (RolloutStep.WAIT, RolloutStep.REPLACE)]
    if worst and not worst.stalled and (sticky := _previous_load_failure(model, old)):
        worst = sticky
    if worst and (worst.stalled or not waiting):
        return ConditionValue("False", worst.reason, "; ".join([worst.message, *waiting[:1]]), worst.stalled)
    words = [*([worst.message] if worst else []), *waiting[:1]]
    if not decision.revision:
        return ConditionValue("False", "Starting", "the model's token is being made")
    return ConditionValue(
        "False", "RollingOut", "; ".join(words) or f"pods of revision {decision.revision} replace older ones"
    )


def serves(view: GroupAssessment) -> bool:
    """By its pods, which the Service goes by, and by its own words, which are quicker."""
    status = view.voice.status
    return view.group.ready and not (status and status.state in _NOT_SERVING)


def _accepts(view: GroupAssessment) -> bool:
    """Whether it takes requests: by its own word, which its first pod's readiness follows."""
    status = view.voice.status
    return view.group.ready if status is None or status.accepting is None else status.accepting


def _previous_load_failure(model: Model, old: Mapping[str, Any]) -> ConditionValue | None:
    """A worker that failed to load tries again and again: the finding stays until it succeeds or the spec changes."""
    loaded = _condition(old, "ModelLoaded")
    if loaded.get("reason") == "LoadFailed" and loaded.get("observedGeneration") == model.generation:
        stalled = _condition(old, "Stalled").get("status") == "True"
        return ConditionValue("False", "ModelLoadFailed", loaded["message"], stalled)
    return None


def _available(model: Model, views: Sequence[GroupAssessment]) -> ConditionValue:
    serving = sum(_accepts(view) for view in views)
    if serving:
        return ConditionValue("True", "Serving", f"{serving} of {_groups(len(views))} take requests")
    if model.replicas == 0:
        return ConditionValue("False", "ScaledToZero", "replicas is 0")
    return ConditionValue("False", "NoGroupReady", "no group takes requests")


def _model_loaded(model: Model, views: Sequence[GroupAssessment], old: Mapping[str, Any]) -> ConditionValue:
    size = model.tensor_parallel_size
    if model.replicas == 0:
        return ConditionValue("False", "ScaledToZero", "replicas is 0: no rank holds weights")
    for view in views:
        status = view.voice.status
        if status and (group_view.failed_ranks(status) or status.state is GroupState.FAILED):
            return ConditionValue("False", "LoadFailed", f"group {view.group.index}: {_load_failure(status)}")
    unloaded = [view for view in views if not (view.voice.status and group_view.loaded(view.voice.status, size))]
    if not unloaded:
        return ConditionValue("True", "Loaded", f"all {model.ranks} ranks hold their weights")
    if _previous_load_failure(model, old):
        return ConditionValue("False", "LoadFailed", _condition(old, "ModelLoaded")["message"])
    silent = next((view.voice.unreachable_reason for view in unloaded if view.voice.unreachable_reason), "")
    if silent:
        return ConditionValue("Unknown", "Unreachable", silent)
    why = explain(unloaded[0], size)
    return ConditionValue("False", why.reason if why.reason != "RollingOut" else "Loading", why.message)


def _collectives(model: Model, views: Sequence[GroupAssessment]) -> ConditionValue:
    if model.replicas == 0:
        return ConditionValue("Unknown", "ScaledToZero", "replicas is 0: no ranks communicate")
    for view in views:
        status = view.voice.status
        if status and status.state in (GroupState.RECOVERING, GroupState.POISONED):
            newest = max(status.faults, key=lambda fault: fault.id, default=None)
            words = newest.message if newest else status.message
            return ConditionValue(
                "False", _fault_of(view), f"group {view.group.index}: {words or 'its ranks were parted'}"
            )
    for view in views:
        status = view.voice.status
        if status is None or status.state not in (GroupState.READY, GroupState.DRAINING):
            words = view.voice.unreachable_reason or f"group {view.group.index} hasn't joined its ranks yet"
            return ConditionValue("Unknown", "Unreachable" if view.voice.unreachable_reason else "NotJoined", words)
    return ConditionValue("True", "Joined", "the ranks of every group have proved that they reach each other")


def _poisoned(views: Sequence[GroupAssessment]) -> ConditionValue:
    for view in views:
        status = view.voice.status
        if status and status.state is GroupState.POISONED:
            words = view.remedy or f"group {view.group.index}: {status.message or 'it can not heal itself'}"
            return ConditionValue("True", _fault_of(view), words)
    return ConditionValue("False", "NotPoisoned", "no group has reported a fault that it can't heal")


def _fault_of(view: GroupAssessment) -> str:
    """The newest fault's name; of a group that only the status tells of, the one that is being repaired."""
    status, memory = view.voice.status, view.verdict.memory if view.verdict else None
    newest = max(status.faults if status else (), key=lambda fault: fault.id, default=None)
    if newest:
        return str(newest.fault)
    return memory.plan.fault if memory and memory.plan and memory.plan.fault else str(status.state if status else "")


def _flag(raised: bool, ready: ConditionValue, reason: str, message: str) -> ConditionValue:
    return ConditionValue("True", ready.reason, ready.message) if raised else ConditionValue("False", reason, message)


def _at_rest(ready: ConditionValue) -> tuple[str, str]:
    return ("Stalled", "what is wrong must be mended first") if ready.stalled else ("Settled", "nothing is under way")


def _groups(count: int) -> str:
    return "1 group" if count == 1 else f"{count} groups"


def _condition(status: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return next((condition for condition in status.get("conditions") or [] if condition["type"] == name), {})
