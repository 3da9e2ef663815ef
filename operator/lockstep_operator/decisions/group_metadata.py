"""Labels and annotations of a group's StatefulSet: schedulers and queues read there what belongs together (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from lockstep_operator.types.names import (
    ADMITTED_ANNOTATION,
    QUEUE_LABEL,
    QUEUE_PRIORITY_LABEL,
    VOLCANO,
    VOLCANO_MINIMUM,
)
from lockstep_operator.types.spec import Model

# What Kueue takes for one kind of room: its webhook refuses a StatefulSet with a queue any change of these in place.
_SHAPE: Final = (
    "nodeSelector", "affinity", "tolerations", "runtimeClassName", "priorityClassName", "topologySpreadConstraints",
    "overhead", "resourceClaims",
)  # fmt: skip
_SHAPE_OF_CONTAINERS: Final = ("resources", "ports")


def workload_labels(model: Model, group: int) -> dict[str, str]:
    return _filled(model.group_metadata.labels, model, group)


def workload_annotations(model: Model, group: int) -> dict[str, str]:
    """With Volcano's for a gang, where Volcano places the pods: it makes a PodGroup for each StatefulSet."""
    gang = {VOLCANO_MINIMUM: str(model.pods_per_group)} if _scheduler(model) == VOLCANO else {}
    return {**gang, **_filled(model.group_metadata.annotations, model, group)}


def admission(model: Model) -> dict[str, str]:
    """What a queue takes a group by, and doesn't let change while the group runs; empty without a queue."""
    given = model.group_metadata.labels
    if not given.get(QUEUE_LABEL):
        return {}
    return {"queue": given[QUEUE_LABEL], "priority": "set" if given.get(QUEUE_PRIORITY_LABEL) else "unset"}


def room(model: Model, template: Mapping[str, Any]) -> dict[str, Any]:
    """What a queue has admitted: its webhook refuses any change of this to a StatefulSet; empty without a queue."""
    queue, spec = admission(model), template["spec"]
    if not queue:
        return {}
    containers = [*(spec.get("initContainers") or []), *spec["containers"]]
    asked = [{name: container.get(name) for name in _SHAPE_OF_CONTAINERS} for container in containers]
    return {**queue, **{name: spec.get(name) for name in _SHAPE}, "containers": asked}


def readmitted(wanted: Mapping[str, Any], live: Mapping[str, Any]) -> bool:
    """Whether the StatefulSet has to be admitted anew to become what is wanted."""
    return _admitted(wanted) != _admitted(live)


def _admitted(workload: Mapping[str, Any]) -> str | None:
    return (workload["metadata"].get("annotations") or {}).get(ADMITTED_ANNOTATION)


def _filled(values: Mapping[str, str], model: Model, group: int) -> dict[str, str]:
    parts = {"$(group)": str(group), "$(pods)": str(model.pods_per_group)}
    return {name: _replaced(value, parts) for name, value in values.items()}


def _replaced(text: str, parts: Mapping[str, str]) -> str:
    for placeholder, value in parts.items():
        text = text.replace(placeholder, value)
    return text


def _scheduler(model: Model) -> Any:
    return (model.template.get("spec") or {}).get("schedulerName")
