"""What keeps the operator itself from doing what the spec asks."""

from __future__ import annotations

from typing import Final

from lockstep_operator.cluster.failures import Failures
from lockstep_operator.decisions.pinning import Pinned
from lockstep_operator.decisions.planner import Decision
from lockstep_operator.groups.group import Group
from lockstep_operator.reporting.conditions import Obstacle
from lockstep_operator.types.model_source import Image
from lockstep_operator.types.model_status import ModelStatus
from lockstep_operator.types.names import ROLLBACK_ANNOTATION
from lockstep_operator.types.reasons import Reason
from lockstep_operator.types.spec import Model
from lockstep_operator.types.timestamps import format_rfc3339

_NO_IMAGE_VOLUMES: Final = (
    "this cluster has no image volumes: the API server leaves spec.model.image out of the pods; turn on its feature "
    "gate ImageVolume, and the kubelets', or give the model another source"
)


def find_obstacle(
    model: Model, decision: Decision, failures: Failures, before: ModelStatus, now: float
) -> Obstacle | None:
    """None if nothing does. `before` is the status as last written."""
    if model.flaw:
        return Obstacle(Reason.INVALID_SPEC, model.flaw, stalled=True)
    if decision.pinned and decision.pinned.lost:
        return Obstacle(Reason.INVALID_SPEC, _unkept(decision.pinned), stalled=True)
    if decision.bugs:
        return Obstacle(Reason.OPERATOR_ERROR, "; ".join(bug.sentence for bug in decision.bugs[:3]), stalled=True)
    if failures.refused:
        return Obstacle(Reason.REFUSED, failures.refused, stalled=True)
    if any(_lost_its_image(model, one.group, decision.revision) for one in decision.groups):
        return Obstacle(Reason.REFUSED, _NO_IMAGE_VOLUMES, stalled=True)
    retrying = failures.retrying(before)
    if retrying is None:
        return None
    if now - retrying.since < model.progress_deadline:
        return Obstacle(Reason.RETRYING, retrying.sentence, stalled=False)
    text = f"{retrying.sentence}; nothing has moved since {format_rfc3339(retrying.since)}"
    return Obstacle(Reason.PROGRESS_DEADLINE_EXCEEDED, text, stalled=True)


def _unkept(pinned: Pinned) -> str:
    kept = ", ".join(sorted(pinned.history.keys() - {pinned.current.revision})) or "none"
    return (
        f"annotation {ROLLBACK_ANNOTATION} names revision {pinned.lost[:80]}, which isn't kept; older ones are: {kept}"
    )


def _lost_its_image(model: Model, group: Group, revision: str) -> bool:
    """An API server without the feature drops the field, and makes an empty folder of the volume."""
    if not isinstance(model.source, Image) or group.workload is None or group.revision != revision:
        return False
    volumes = group.workload["spec"]["template"]["spec"].get("volumes") or []
    return not any("image" in volume for volume in volumes)
