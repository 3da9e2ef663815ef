"""What is worth an Event (pure). Names follow from what happened, so an operator that starts anew repeats none."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lockstep_operator.decide import Action, Apply
from lockstep_operator.moment import micro
from lockstep_operator.names import API_VERSION, KIND
from lockstep_operator.observe import Observed, Report
from lockstep_operator.spec import Model
from lockstep_operator.voices import block_of

NOTE_LIMIT = 1000


@dataclass(frozen=True, slots=True)
class Occurrence:
    """`key` tells it from every other of the model."""

    key: str
    reason: str
    note: str
    warning: bool = False


def occurrences(observed: Observed, new: Mapping[str, Any], done: Sequence[Action]) -> list[Occurrence]:
    """What this pass found or did, by the status before and after it and the actions that succeeded."""
    old = observed.status
    return [*_beginnings(old, new), *_turns(old, new), *_faults(old, observed.reports), *_repairs(observed, done)]


def manifest(model: Model, occurrence: Occurrence, now: float) -> dict[str, Any]:
    digest = hashlib.sha256(f"{model.uid}/{occurrence.key}".encode()).hexdigest()[:16]
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": f"{model.name}.{digest}", "namespace": model.namespace},
        "eventTime": micro(now),
        "reportingController": "lockstep.dev/operator",
        "reportingInstance": "lockstep-operator",
        "action": "Reconcile",
        "reason": occurrence.reason,
        "note": occurrence.note[:NOTE_LIMIT],
        "type": "Warning" if occurrence.warning else "Normal",
        "regarding": {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "namespace": model.namespace,
            "name": model.name,
            "uid": model.uid,
        },
    }


def _beginnings(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Occurrence]:
    if "observedGeneration" not in old:
        yield Occurrence("created", "Created", "pods and Services are being made")
    before, after = old.get("revision"), new.get("revision")
    if before and after and before != after:
        note = f"the spec asks for revision {after} instead of {before}: groups are replaced in turn"
        yield Occurrence(f"rollout/{before}/{after}/{new['observedGeneration']}", "RollingOut", note)


def _turns(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Occurrence]:
    """Conditions that turned. The old one's time tells this turn from earlier and later ones."""
    before, after = _by_type(old), _by_type(new)
    for name in ("Ready", "Stalled", "Poisoned"):
        was, now = before.get(name), after.get(name)
        if now is None or (was or {}).get("status", "False") == now["status"]:
            continue
        key = f"{name}/{now['status']}/{(was or {}).get('lastTransitionTime', '')}"
        if name == "Ready":
            good = now["status"] == "True" or now["reason"] in ("RollingOut", "ScalingDown")
            yield Occurrence(key, "Ready" if now["status"] == "True" else "NotReady", now["message"], warning=not good)
        elif now["status"] == "True":
            yield Occurrence(key, name if name == "Poisoned" else now["reason"], now["message"], warning=True)


def _faults(old: Mapping[str, Any], reports: Mapping[int, Report]) -> Iterator[Occurrence]:
    for group, report in sorted(reports.items()):
        if report.status is None:
            continue
        block, incarnation = block_of(old, group), report.status.incarnation
        told = block.get("lastFaultID", 0) if block.get("incarnation") == incarnation else 0
        for fault in sorted(report.status.faults, key=lambda fault: fault.id):
            if fault.id > told:
                where = f"group {group}" if fault.rank is None else f"group {group} rank {fault.rank}"
                yield Occurrence(
                    f"fault/{group}/{incarnation}/{fault.id}",
                    str(fault.fault),
                    f"{where}: {fault.message}",
                    warning=True,
                )


def _repairs(observed: Observed, done: Sequence[Action]) -> Iterator[Occurrence]:
    for action in done:
        if isinstance(action, Apply) and action.repairs:
            live = observed.child(action.kind, action.name)
            version = live["metadata"]["resourceVersion"] if live else f"missing/{observed.resource_version}"
            note = f"{action.kind} {action.name} was changed from outside and is put right: {action.repairs}"
            yield Occurrence(f"repair/{action.kind}/{action.name}/{version}", "DriftRepaired", note)


def _by_type(status: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {condition["type"]: condition for condition in status.get("conditions") or []}
