"""What is worth an Event (pure). Names follow from what happened, so an operator that restarts repeats none."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from lockstep_operator.decisions.actions import Apply, Delete, MakeTokens
from lockstep_operator.reporting.transition import Transition
from lockstep_operator.types.model_status import Condition, ModelStatus
from lockstep_operator.types.names import API_VERSION, KIND, REPORTER, ModelKey
from lockstep_operator.types.observed import Pod
from lockstep_operator.types.reasons import ConditionType, EventReason, Reason
from lockstep_operator.types.timestamps import format_micro, format_rfc3339

NOTE_LIMIT: Final = 1000


@dataclass(frozen=True, slots=True)
class EventDraft:
    """`key` is unique among the Events of the model. It is about the model, about `pod` or about `node`.

    `at`: when it was, in unix seconds, if that is known. `order` sorts what falls into the same second, as faults and
    their repairs do: it is a part of the name, so it must be the same in every pass.
    """

    key: str
    reason: str
    note: str
    warning: bool = False
    at: float | None = None
    order: str = ""
    pod: Pod | None = None
    node: str = ""


def event_drafts(change: Transition) -> list[EventDraft]:
    """What this pass found or did."""
    return [
        *_beginnings(change.before, change.after),
        *_deprecations(change),
        *condition_changes(change.before, change.after),
        *_other_budgets(change.before, change.after),
        *_process_failures(change.before, change.after),
        *_faults(change),
        *_recovery_steps(change.before, change.after),
        *_repairs(change),
        *_drift_repairs(change),
        *_lost_pods(change),
        *_new_tokens(change),
        *_node_faults(change),
    ]


def manifest(key: ModelKey, uid: str, draft: EventDraft, now: float) -> dict[str, Any]:
    """Of the core API: `kubectl describe` sorts by `lastTimestamp`, which Events of events.k8s.io may not have, and
    then by name."""
    digest = hashlib.sha256(f"{uid}/{draft.key}".encode()).hexdigest()[:16]
    at = min(draft.at or now, now)
    model = {"apiVersion": API_VERSION, "kind": KIND, "name": key.name, "uid": uid}
    pod = draft.pod and {"apiVersion": "v1", "kind": "Pod", "name": draft.pod.name, "uid": draft.pod.uid}
    # As the kubelet writes about its node: `kubectl describe node` looks for the name as its UID.
    node = draft.node and {"apiVersion": "v1", "kind": "Node", "name": draft.node, "uid": draft.node}
    about = node or pod or model
    namespace = "default" if node else key.namespace  # where those of what has no namespace belong
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{about['name']}.{draft.order}{digest}", "namespace": namespace},
        "eventTime": format_micro(at),
        "firstTimestamp": format_rfc3339(at),
        "lastTimestamp": format_rfc3339(at),
        "count": 1,
        "source": {"component": "lockstep-operator"},
        "reportingComponent": REPORTER,
        "reportingInstance": "lockstep-operator",
        "action": "Reconcile",
        "reason": str(draft.reason),
        "message": (f"{key}: {draft.note}" if node else draft.note)[:NOTE_LIMIT],
        "type": "Warning" if draft.warning else "Normal",
        "involvedObject": about if node else {"namespace": namespace, **about},
    }


def _beginnings(before: ModelStatus, after: ModelStatus) -> Iterator[EventDraft]:
    if before.observed_generation is None:
        yield EventDraft("created", EventReason.CREATED, "pods and Services are being created")
    old, new = before.revision, after.revision
    if old and new and old != new:
        note = f"the spec asks for revision {new} instead of {old}: groups are replaced in turn"
        yield EventDraft(f"rollout/{old}/{new}/{after.observed_generation}", EventReason.ROLLING_OUT, note)


def _deprecations(change: Transition) -> Iterator[EventDraft]:
    for sentence in change.deprecated:
        key = f"deprecated/{sentence}/{change.after.observed_generation}"
        yield EventDraft(key, EventReason.DEPRECATED, sentence, warning=True)


def condition_changes(before: ModelStatus, after: ModelStatus) -> Iterator[EventDraft]:
    """The old condition's time distinguishes this change from earlier and later ones."""
    stalls = _stalls(before.condition(ConditionType.STALLED), after.condition(ConditionType.STALLED))
    for kind in (ConditionType.READY, ConditionType.STALLED, ConditionType.POISONED):
        was, now = before.condition(kind), after.condition(kind)
        turned = now is not None and now.status != (was.status if was else "False")
        if now is None or not (stalls if kind is ConditionType.STALLED else turned):
            continue
        since = format_rfc3339(was.last_transition_time) if was else ""
        key = f"{kind}/{now.status}/{since}"
        if kind is ConditionType.STALLED:
            yield EventDraft(f"{key}/{now.reason}", now.reason, now.message, warning=True)
        elif now.status == "True":
            yield EventDraft(key, str(kind), now.message, warning=kind is ConditionType.POISONED)
        elif kind is ConditionType.READY and not stalls:  # else the stall reports the same
            expected = now.reason in (Reason.ROLLING_OUT, Reason.SCALING_DOWN)
            yield EventDraft(key, EventReason.NOT_READY, now.message, warning=not expected)


def _other_budgets(before: ModelStatus, after: ModelStatus) -> Iterator[EventDraft]:
    kind = ConditionType.DISRUPTIONS_BOUNDED
    was, now = before.condition(kind), after.condition(kind)
    if now and now.reason == Reason.OTHER_BUDGET and not (was and was.message == now.message):
        since = format_rfc3339(was.last_transition_time) if was else ""
        yield EventDraft(f"budget/{since}/{now.message}", now.reason, now.message, warning=True)


def _stalls(was: Condition | None, now: Condition | None) -> bool:
    """Whether it has just stalled, or for another reason than before."""
    if now is None or now.status != "True":
        return False
    return was is None or (was.status, was.reason) != ("True", now.reason)


def _process_failures(before: ModelStatus, after: ModelStatus) -> Iterator[EventDraft]:
    for group in after.groups:
        found = group.pod_problem
        if found and found != before.group(group.group).pod_problem:
            key = f"pod/{group.group}/{found.reason}/{format_rfc3339(found.time)}"
            yield EventDraft(key, found.reason, found.message, warning=True, at=found.time)


def _faults(change: Transition) -> Iterator[EventDraft]:
    for one in change.faults:
        fault = one.record
        where = f"group {one.group}" if fault.rank is None else f"group {one.group} rank {fault.rank}"
        key = f"fault/{one.group}/{one.incarnation}/{fault.id}"
        note, order = f"{where}: {fault.message}", _order(fault.at, "0")
        draft = EventDraft(key, str(fault.fault), note, warning=True, at=fault.at, order=order)
        yield draft
        if one.pod:  # people look at the pod first
            yield replace(draft, pod=one.pod)


def _recovery_steps(before: ModelStatus, after: ModelStatus) -> Iterator[EventDraft]:
    """Recovery steps that were not in the status before. The previous step distinguishes one from other answers to the
    same fault; its own time can't: an operator that dies may have reported it without writing it down."""
    for group in after.groups:
        action, known = group.recovery.action, before.group(group.group).recovery.action
        if action is None or action.healed:
            continue
        if known is None or (action.trigger, action.since) != (known.trigger, known.since):
            reason = f"Would{action.rung}" if action.dry_run else str(action.rung)
            key = f"step/{group.group}/{action.trigger}/{known.since if known else 0:.0f}"
            yield EventDraft(key, reason, action.reason, warning=True)


def _repairs(change: Transition) -> Iterator[EventDraft]:
    for repair in change.repairs:
        key = f"healed/{repair.group}/{repair.rung}/{repair.noticed:.3f}"
        order = _order(repair.noticed, "1")
        yield EventDraft(key, EventReason.RECOVERED, repair.sentence, at=repair.finished, order=order)


def _order(noticed: float, stage: str) -> str:
    return f"{round(noticed * 1000):x}.{stage}."


def _lost_pods(change: Transition) -> Iterator[EventDraft]:
    for action in change.actions:
        if isinstance(action, Delete) and action.grace == 0:
            yield EventDraft(f"lost/{action.uid}", EventReason.POD_LOST, action.reason, warning=True)


def _new_tokens(change: Transition) -> Iterator[EventDraft]:
    """The first ones are no news."""
    known = change.before.tokens
    for action in change.actions:
        if isinstance(action, MakeTokens) and known is not None:
            key = f"tokens/{known.key}/{known.id}/{format_rfc3339(known.time)}/{action.made.key}/{action.made.id}"
            note = f"{action.reason}; pods that have the same Secret take it up within two minutes, and go on serving"
            yield EventDraft(key, EventReason.TOKENS_MADE, note)


def _node_faults(change: Transition) -> Iterator[EventDraft]:
    for one in change.node_faults:
        yield EventDraft(one.key, one.fault, one.sentence, warning=True, at=one.at, node=one.node)


def _drift_repairs(change: Transition) -> Iterator[EventDraft]:
    for action in change.actions:
        if isinstance(action, Apply) and action.repairs:
            note = f"{action.kind} {action.name} was changed from outside and is corrected: {action.repairs}"
            yield EventDraft(f"repair/{action.kind}/{action.name}/{action.version}", EventReason.DRIFT_REPAIRED, note)
