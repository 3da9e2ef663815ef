"""The conditions of a model (pure): Ready means "as the spec asks", Available means "somebody answers"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from lockstep_operator.decisions.planner import Decision
from lockstep_operator.decisions.rollout import RolloutStep
from lockstep_operator.groups import group_view
from lockstep_operator.reporting.assessment import GroupAssessment
from lockstep_operator.reporting.blockers import Blocker, load_failure
from lockstep_operator.types.model_status import Condition, ModelStatus
from lockstep_operator.types.names import FENCED_ANNOTATION, PAUSED_ANNOTATION, ROLLBACK_ANNOTATION
from lockstep_operator.types.reasons import ConditionType, Reason
from lockstep_operator.types.spec import Model
from lockstep_runtime.protocol.status import GroupState

MESSAGE_LIMIT: Final = 2000
_PAUSED: Final = f"annotation {PAUSED_ANNOTATION} is true, so nothing is created, changed or deleted"


@dataclass(frozen=True, slots=True)
class ConditionValue:
    """`stalled`: it won't resolve by itself."""

    status: str
    reason: str
    message: str
    stalled: bool = False


@dataclass(frozen=True, slots=True)
class Obstacle:
    """What keeps the operator itself from doing what the spec asks."""

    reason: Reason
    message: str
    stalled: bool


Conditions = Mapping[ConditionType, ConditionValue]


def conditions(
    model: Model, decision: Decision, groups: Sequence[GroupAssessment], obstacle: Obstacle | None, before: ModelStatus
) -> Conditions:
    """`before` is the status as last written."""
    ready = _ready(model, decision, groups, obstacle, before)
    withheld, evacuating = _withheld(model), _evacuating(model, decision)
    return {
        ConditionType.READY: ready,
        ConditionType.AVAILABLE: _available(model, groups),
        ConditionType.MODEL_LOADED: _model_loaded(model, groups, before),
        ConditionType.COLLECTIVES_HEALTHY: _collectives(model, groups),
        ConditionType.POISONED: _poisoned(groups),
        ConditionType.RECONCILING: _reconciling(ready),
        ConditionType.STALLED: _stalled(ready),
        ConditionType.DISRUPTIONS_BOUNDED: _disruptions(model, decision),
        **({ConditionType.EVACUATING: evacuating} if evacuating else {}),
        **({ConditionType.PAUSED: withheld} if withheld else {}),
    }


def halted(reason: Reason, message: str) -> Conditions:
    """Of a model that the operator can't work on."""
    return {
        ConditionType.READY: ConditionValue("False", reason, message),
        ConditionType.RECONCILING: ConditionValue("False", reason, "nothing is done until that is fixed"),
        ConditionType.STALLED: ConditionValue("True", reason, message),
    }


def dated(values: Conditions, generation: int, before: ModelStatus, now: float) -> tuple[Condition, ...]:
    """As the status has them; a condition whose status stays keeps its time."""
    return tuple(_dated(kind, value, generation, before.condition(kind), now) for kind, value in values.items())


def _dated(kind: str, value: ConditionValue, generation: int, known: Condition | None, now: float) -> Condition:
    return Condition(
        type=str(kind),
        status=value.status,
        reason=str(value.reason),
        message=value.message[:MESSAGE_LIMIT],
        observed_generation=generation,
        last_transition_time=known.last_transition_time if known and known.status == value.status else now,
    )


def _ready(
    model: Model, decision: Decision, groups: Sequence[GroupAssessment], obstacle: Obstacle | None, before: ModelStatus
) -> ConditionValue:
    conflicts = decision.conflicts
    if conflicts.sentence:
        return ConditionValue("False", Reason.NAME_CONFLICT, conflicts.sentence, stalled=not conflicts.ends)
    if obstacle:
        return ConditionValue("False", obstacle.reason, obstacle.message, stalled=obstacle.stalled)
    if leaving := _leaving(model, decision):
        listed = ", ".join(map(str, leaving))
        return ConditionValue("False", Reason.SCALING_DOWN, f"group {listed} finishes its requests and is removed")
    if model.replicas == 0:
        return ConditionValue("True", Reason.SCALED_TO_ZERO, "replicas is 0: nothing is served, as asked")
    due = {turn.group: turn.revision or decision.revision for turn in decision.rollout}
    behind = [one for one in groups if not (one.serves and one.group.ready_at(due.get(one.group.index, "")))]
    if not behind:
        return _all_serve(decision, f"{_groups(len(groups))} of {model.tensor_parallel_size} ranks serve")
    found = _not_ready(decision, _worst(model, behind, before))
    if model.intervention.paused and not found.stalled:
        return ConditionValue("False", Reason.PAUSED, f"{found.message}; {_PAUSED}")
    return found


def _all_serve(decision: Decision, text: str) -> ConditionValue:
    """As the spec asks, or as whoever rolls out asks beside it."""
    held = sum(turn.step is RolloutStep.HOLD for turn in decision.rollout)
    if held:
        text += f": {_groups(held)} below rollout.partition keep an older revision than {decision.revision}"
        return ConditionValue("True", Reason.CANARY, f"{text}; lower it to go on, or take the change back")
    if decision.pinned and decision.pinned.rolled_back:
        text += f" with revision {decision.revision}, as the annotation {ROLLBACK_ANNOTATION} asks, and not as the spec"
        return ConditionValue("True", Reason.ROLLED_BACK, f"{text} does; change the spec, or remove the annotation")
    return ConditionValue("True", Reason.READY, text)


def _leaving(model: Model, decision: Decision) -> list[int]:
    """Groups that are removed, or will be as soon as the status says that nobody wants them."""
    wanted = {*range(model.replicas), *(one.group for one in decision.surge)}
    dropped = [one.group.index for one in decision.groups if one.group.index not in wanted]
    return [*(group.index for group in decision.excess), *dropped]


def _worst(model: Model, behind: Sequence[GroupAssessment], before: ModelStatus) -> Blocker | None:
    """None when all serve, some with an older revision."""
    blockers = [one.blocker for one in behind if not one.serves]
    worst = next((blocker for blocker in blockers if blocker.stalled), blockers[0] if blockers else None)
    return worst if worst is None or worst.stalled else _previous_load_failure(model, before) or worst


def _not_ready(decision: Decision, worst: Blocker | None) -> ConditionValue:
    moving = (RolloutStep.WAIT, RolloutStep.REPLACE)
    waiting = [one.reason for one in decision.rollout if one.step in moving][:1]
    text = "; ".join([*([worst.message] if worst else []), *waiting])
    if worst and (worst.stalled or not waiting):
        return ConditionValue("False", worst.reason, text, worst.stalled)
    return ConditionValue(
        "False", Reason.ROLLING_OUT, text or f"pods of revision {decision.revision} replace older ones"
    )


def _previous_load_failure(model: Model, before: ModelStatus) -> Blocker | None:
    """A worker that failed to load tries again and again: the reason stays until it succeeds or the spec changes."""
    loaded = before.condition(ConditionType.MODEL_LOADED)
    if loaded and loaded.reason == Reason.LOAD_FAILED and loaded.observed_generation == model.generation:
        return Blocker(Reason.MODEL_LOAD_FAILED, loaded.message, before.is_true(ConditionType.STALLED))
    return None


def _available(model: Model, groups: Sequence[GroupAssessment]) -> ConditionValue:
    serving = sum(one.accepts for one in groups)
    if serving:
        return ConditionValue("True", Reason.SERVING, f"{serving} of {_groups(len(groups))} accept requests")
    if model.replicas == 0:
        return ConditionValue("False", Reason.SCALED_TO_ZERO, "replicas is 0")
    return ConditionValue("False", Reason.NO_GROUP_READY, "no group accepts requests")


def _model_loaded(model: Model, groups: Sequence[GroupAssessment], before: ModelStatus) -> ConditionValue:
    if model.replicas == 0:
        return ConditionValue("False", Reason.SCALED_TO_ZERO, "replicas is 0: no rank holds weights")
    for one in groups:
        if one.status and group_view.failed_to_load(one.status):
            return ConditionValue("False", Reason.LOAD_FAILED, f"group {one.group.index}: {load_failure(one.status)}")
    size = model.tensor_parallel_size
    unloaded = [one for one in groups if not (one.status and group_view.loaded(one.status, size))]
    if not unloaded:
        return ConditionValue("True", Reason.LOADED, f"all {model.ranks} ranks hold their weights")
    if failure := _previous_load_failure(model, before):
        return ConditionValue("False", Reason.LOAD_FAILED, failure.message)
    unreachable = next((text for one in unloaded if (text := one.facts.view.unreachable_reason)), "")
    if unreachable:
        return ConditionValue("Unknown", Reason.UNREACHABLE, unreachable)
    return ConditionValue("False", unloaded[0].blocker.reason, unloaded[0].blocker.message)


def _collectives(model: Model, groups: Sequence[GroupAssessment]) -> ConditionValue:
    if model.replicas == 0:
        return ConditionValue("Unknown", Reason.SCALED_TO_ZERO, "replicas is 0: no ranks communicate")
    for one in groups:
        if one.status and one.status.state in (GroupState.RECOVERING, GroupState.POISONED):
            newest = group_view.newest_fault(one.status)
            text = (newest.message if newest else one.status.message) or "its ranks lost their communicator"
            return ConditionValue("False", one.fault, f"group {one.group.index}: {text}")
    for one in groups:
        if one.status is None or one.status.state not in (GroupState.READY, GroupState.DRAINING):
            unreachable = one.facts.view.unreachable_reason
            text = unreachable or f"group {one.group.index} has ranks that haven't joined yet"
            return ConditionValue("Unknown", Reason.UNREACHABLE if unreachable else Reason.NOT_JOINED, text)
    return ConditionValue("True", Reason.JOINED, "the ranks of every group have proved that they reach each other")


def _poisoned(groups: Sequence[GroupAssessment]) -> ConditionValue:
    for one in groups:
        if one.status and one.status.state is GroupState.POISONED:
            text = one.remedy or f"group {one.group.index}: {one.status.message or 'it cannot recover by itself'}"
            return ConditionValue("True", one.fault, text)
    return ConditionValue("False", Reason.NOT_POISONED, "no group has reported a fault that it can't recover from")


def _reconciling(ready: ConditionValue) -> ConditionValue:
    """Of kstatus."""
    if ready.status == "True":
        return ConditionValue("False", Reason.SETTLED, "nothing is under way")
    if ready.stalled:
        return ConditionValue("False", Reason.STALLED, "the cause must be fixed first")
    return ConditionValue("True", ready.reason, ready.message)


def _stalled(ready: ConditionValue) -> ConditionValue:
    """Of kstatus."""
    if ready.status != "True" and ready.stalled:
        return ConditionValue("True", ready.reason, ready.message)
    return ConditionValue("False", Reason.NOT_STALLED, "nothing needs a person")


def _disruptions(model: Model, decision: Decision) -> ConditionValue:
    if other := decision.disruption.foreign:
        text = (
            f"PodDisruptionBudget {other} selects pods of this model or has its name, so Lockstep keeps none: two make "
            "evictions fail. Delete it, or set spec.disruption.budget to None"
        )
        return ConditionValue("False", Reason.OTHER_BUDGET, text)
    if not model.disruption.has_budget:
        return ConditionValue("False", Reason.NO_BUDGET, "spec.disruption.budget is None")
    return ConditionValue("True", Reason.ONE_GROUP_AT_A_TIME, "evictions take one group at a time")


def _evacuating(model: Model, decision: Decision) -> ConditionValue | None:
    """Of groups whose pods must leave their nodes; None: there are none."""
    found = decision.evacuation
    if not found.leaving and not found.stand_ins:
        return None
    why = "; ".join(f"group {group}: {why}" for group, why in sorted(found.leaving.items()))
    by = ", ".join(map(str, found.stand_ins)) or str(model.replicas)
    if found.overdue:
        late = f"group {by} could not stand in within {model.progress_deadline:g} s"
        text = f"{why}; {late}, so evictions may take one group"
        return ConditionValue("True", Reason.NO_STAND_IN, text)
    text = f"{why}; it is moved when group {by} serves" if why else f"group {by} stands in until all groups serve"
    return ConditionValue("True", Reason.EVACUATING, text)


def _withheld(model: Model) -> ConditionValue | None:
    """What a person has taken out of the operator's hands; None: nothing."""
    if model.intervention.paused:
        return ConditionValue("True", Reason.PAUSED, f"{_PAUSED}; what is so is reported")
    if fenced := sorted(model.intervention.fenced):
        text = f"{FENCED_ANNOTATION}: groups {', '.join(map(str, fenced))} take no requests, and are left as they are"
        return ConditionValue("True", Reason.GROUPS_FENCED, text)
    return None


def _groups(count: int) -> str:
    return "1 group" if count == 1 else f"{count} groups"
