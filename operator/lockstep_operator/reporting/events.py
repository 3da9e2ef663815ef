"""What is worth an Event (pure). Names follow from what happened, so an operator that starts anew repeats none."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lockstep_operator.decisions.planner import Action, Apply, Delete
from lockstep_operator.groups.group_view import block_of
from lockstep_operator.reporting import recovery_log
from lockstep_operator.reporting.recovery_log import Repair
from lockstep_operator.types.names import API_VERSION, KIND, ModelKey
from lockstep_operator.types.observed import Observed
from lockstep_operator.types.recovery_state import RecoveryState, from_status
from lockstep_operator.types.timestamps import format_micro, format_rfc3339, parse_rfc3339
from lockstep_runtime.protocol.status import GroupStatus

NOTE_LIMIT = 1000


@dataclass(frozen=True, slots=True)
class EventDraft:
    """`key` tells it from every other of the model.

    `at`: when it was, in unix seconds, if that is known. `order` sorts what falls into the same second, as faults and
    their repairs do: it is a part of the name, so it must be the same at every look.
    """

    key: str
    reason: str
    note: str
    warning: bool = False
    at: float | None = None
    order: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconcileResult:
    """One look: the status before and after it, the actions that succeeded, and what recovery remembers now."""

    observed: Observed
    new: Mapping[str, Any]
    done: Sequence[Action]
    memories: Mapping[int, RecoveryState]
    now: float

    @property
    def old(self) -> Mapping[str, Any]:
        return self.observed.status

    @property
    def said(self) -> list[GroupStatus]:
        """What groups said to this operator."""
        return [report.status for _, report in sorted(self.observed.reports.items()) if report.status]

    @property
    def repairs(self) -> list[Repair]:
        """Groups that were healed, by themselves or by the operator."""
        own = recovery_log.completed_repairs(self.old, self.said, self.memories, self.now)
        by_operator = recovery_log.operator_repairs(self.old, self.said, self.memories, self.now)
        return [*(recovery_log.repair_of(status.group, fault) for status, fault in own), *by_operator]


def event_drafts(seen: ReconcileResult) -> list[EventDraft]:
    """What this pass found or did."""
    return [
        *_beginnings(seen.old, seen.new),
        *turns(seen.old, seen.new),
        *_complaints(seen.old, seen.new),
        *_faults(seen),
        *_steps(seen.old, seen.memories),
        *_healed(seen),
        *_repairs(seen.observed, seen.done),
        *_given_up(seen.done),
    ]


def manifest(key: ModelKey, uid: str, occurrence: EventDraft, now: float) -> dict[str, Any]:
    """Of the core API: `kubectl describe` sorts by `lastTimestamp`, which Events of events.k8s.io may not have, and
    then by name."""
    digest = hashlib.sha256(f"{uid}/{occurrence.key}".encode()).hexdigest()[:16]
    at = min(occurrence.at or now, now)
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{key.name}.{occurrence.order}{digest}", "namespace": key.namespace},
        "eventTime": format_micro(at),
        "firstTimestamp": format_rfc3339(at),
        "lastTimestamp": format_rfc3339(at),
        "count": 1,
        "source": {"component": "lockstep-operator"},
        "reportingComponent": "lockstep.dev/operator",
        "reportingInstance": "lockstep-operator",
        "action": "Reconcile",
        "reason": occurrence.reason,
        "message": occurrence.note[:NOTE_LIMIT],
        "type": "Warning" if occurrence.warning else "Normal",
        "involvedObject": {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "namespace": key.namespace,
            "name": key.name,
            "uid": uid,
        },
    }


def _beginnings(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[EventDraft]:
    if "observedGeneration" not in old:
        yield EventDraft("created", "Created", "pods and Services are being made")
    before, after = old.get("revision"), new.get("revision")
    if before and after and before != after:
        note = f"the spec asks for revision {after} instead of {before}: groups are replaced in turn"
        yield EventDraft(f"rollout/{before}/{after}/{new['observedGeneration']}", "RollingOut", note)


def turns(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[EventDraft]:
    """Conditions that turned. The old one's time tells this turn from earlier and later ones."""
    before, after = _by_type(old), _by_type(new)
    stalls = _stalls(before.get("Stalled", {}), after.get("Stalled", {}))
    for name in ("Ready", "Stalled", "Poisoned"):
        was, now = before.get(name, {}), after.get(name)
        if now is None or (was.get("status", "False") == now["status"] and not (name == "Stalled" and stalls)):
            continue
        key = f"{name}/{now['status']}/{was.get('lastTransitionTime', '')}"
        if name == "Ready":
            good = now["status"] == "True" or now["reason"] in ("RollingOut", "ScalingDown")
            if now["status"] == "True" or not stalls:  # else the stall tells the same
                yield EventDraft(
                    key, "Ready" if now["status"] == "True" else "NotReady", now["message"], warning=not good
                )
        elif name == "Stalled" and stalls:
            yield EventDraft(f"{key}/{now['reason']}", now["reason"], now["message"], warning=True)
        elif now["status"] == "True":
            yield EventDraft(key, name, now["message"], warning=True)


def _stalls(was: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether it has just stalled, or for another reason than before."""
    return now.get("status") == "True" and (was.get("status"), was.get("reason")) != ("True", now["reason"])


def _complaints(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[EventDraft]:
    for group in new.get("groups") or []:
        told, found = block_of(old, group["group"]).get("podProblem"), group.get("podProblem")
        if found and found != told:
            key = f"pod/{group['group']}/{found['reason']}/{found['time']}"
            yield EventDraft(key, found["reason"], found["message"], warning=True, at=parse_rfc3339(found["time"]))


def _faults(seen: ReconcileResult) -> Iterator[EventDraft]:
    for status, fault in recovery_log.new_faults(seen.old, seen.said):
        where = f"group {status.group}" if fault.rank is None else f"group {status.group} rank {fault.rank}"
        key = f"fault/{status.group}/{status.incarnation}/{fault.id}"
        note, order = f"{where}: {fault.message}", _order(fault.at, "0")
        yield EventDraft(key, str(fault.fault), note, warning=True, at=fault.at, order=order)


def _steps(old: Mapping[str, Any], memories: Mapping[int, RecoveryState]) -> Iterator[EventDraft]:
    """Decisions of recovery that were not in the status before. The step before it tells one from other answers to the
    same trigger: its own time is another one whenever a dying operator could tell of it and not write it down."""
    for group, memory in sorted(memories.items()):
        plan, known = memory.plan, from_status(block_of(old, group).get("recovery")).plan
        if plan and not plan.healed and (known is None or (plan.trigger, plan.since) != (known.trigger, known.since)):
            reason = f"Would{plan.rung}" if plan.dry_run else str(plan.rung)
            key = f"step/{group}/{plan.trigger}/{known.since if known else 0:.0f}"
            yield EventDraft(key, reason, plan.reason, warning=True)


def _healed(seen: ReconcileResult) -> Iterator[EventDraft]:
    for repair in seen.repairs:
        key = f"healed/{repair.group}/{repair.rung}/{repair.noticed:.3f}"
        order = _order(repair.noticed, "1")
        yield EventDraft(key, "Recovered", repair.sentence, at=repair.finished, order=order)


def _order(noticed: float, stage: str) -> str:
    return f"{round(noticed * 1000):x}.{stage}."


def _given_up(done: Sequence[Action]) -> Iterator[EventDraft]:
    for action in done:
        if isinstance(action, Delete) and action.grace == 0:
            yield EventDraft(f"lost/{action.uid}", "PodLost", action.reason, warning=True)


def _repairs(observed: Observed, done: Sequence[Action]) -> Iterator[EventDraft]:
    for action in done:
        if isinstance(action, Apply) and action.repairs:
            live = observed.child(action.kind, action.name)
            version = live["metadata"]["resourceVersion"] if live else f"missing/{observed.resource_version}"
            note = f"{action.kind} {action.name} was changed from outside and is put right: {action.repairs}"
            yield EventDraft(f"repair/{action.kind}/{action.name}/{version}", "DriftRepaired", note)


def _by_type(status: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {condition["type"]: condition for condition in status.get("conditions") or []}
