"""The status as a document that fits into an object (pure)."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from lockstep_operator.reporting import conditions
from lockstep_operator.reporting.significance import VOLATILE, Document
from lockstep_operator.types.model_status import ModelStatus, render, render_conditions
from lockstep_operator.types.reasons import Reason

SIZE_LIMIT: Final = 200 * 1024  # bytes, before details are left out
_COUNTERS: Final = ("incarnation", "recoveries", "lastFaultID", "lastRepairID", "startSeconds")
_DETAILS: Final = frozenset({"ranks", "leader", *VOLATILE})
_ESSENTIAL: Final = (
    "observedGeneration",
    "conditions",
    "replicas",
    "readyReplicas",
    "selector",
    "revision",
    "model",
    "surge",
    "runtime",
    "rollback",
    "tokens",
    "recoveries",
    "savings",
    "nodeFaults",
)


def document(status: ModelStatus) -> dict[str, Any]:
    """With less detail the larger it is: etcd takes no object above 1.5 MiB."""
    found = render(status)
    for lean in (_without_details, _without_messages):
        if len(msgspec.json.encode(found)) <= SIZE_LIMIT:
            break
        found = {**found, "groups": [lean(group, status.revision) for group in found["groups"]]}
    return found


def halted(old: Document, before: ModelStatus, generation: int, reason: Reason, message: str, now: float) -> Document:
    """For a model that the operator can't work on: the rest of `old` stays as it was, and so do the pods. `before` is
    what could be read of it."""
    found = conditions.dated(conditions.halted(reason, message), generation, before, now)
    kinds = {condition.type for condition in found}
    kept = [condition for condition in old.get("conditions") or [] if condition["type"] not in kinds]
    return {**old, "observedGeneration": generation, "conditions": [*render_conditions(found), *kept]}


def essential(status: Document) -> dict[str, Any]:
    """What an operator that restarts needs: conditions, counts, and what recovery remembers."""
    kept = ("group", "leaderUID", "recovery", *_COUNTERS)
    groups = [{name: group[name] for name in kept if name in group} for group in status.get("groups") or []]
    return {name: status[name] for name in _ESSENTIAL if name in status} | {"groups": groups}


def _without_details(group: Document, revision: str) -> dict[str, Any]:
    """Also without what is so for most groups: the model's revision, and nothing."""
    kept = {
        name: value
        for name, value in group.items()
        if (name not in _DETAILS and value not in ("", 0)) or name == "group"
    }
    if kept.get("revision") == revision:
        del kept["revision"]
    return {name: value[:80] if name == "message" else value for name, value in kept.items()}


def _without_messages(group: Document, revision: str) -> dict[str, Any]:
    del revision
    kept = {name: value for name, value in group.items() if name not in ("message", "podProblem")}
    recovery = kept.get("recovery") or {}
    return kept | ({"recovery": {**recovery, "message": recovery["message"][:80]}} if "message" in recovery else {})
