"""The copy of a model that a game day breaks (pure): one group of the same spec under another name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from lockstep_operator.plugin.asking import ALLOWS_FAULTS
from lockstep_operator.types.names import API_VERSION, CONTAINER, KIND
from lockstep_operator.types.observed import Object

GAMEDAY_LABEL: Final = "lockstep.dev/gameday"
_LONGEST: Final = 40  # characters of a model's name
_FAULTS: Final = {"name": ALLOWS_FAULTS, "value": "true"}


def shadow(model: Mapping[str, Any], mark: str) -> Object:
    """Of a TensorParallelModel. `mark` tells its copies apart. Its group takes faults on purpose, its Service is its
    own, and none of the model's labels leads to it."""
    spec, name = model["spec"], model["metadata"]["name"]
    kept = {field: value for field, value in spec.items() if field not in ("replicas", "rollout")}
    source = {"servedName": name, **spec["model"]}
    ending = f"-gameday-{mark}"
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {
            "name": f"{name[: _LONGEST - len(ending)].rstrip('-')}{ending}",
            "namespace": model["metadata"]["namespace"],
            "labels": {GAMEDAY_LABEL: name},
        },
        "spec": {**kept, "model": source, "replicas": 1, "template": _breakable(spec.get("template") or {})},
    }


def _breakable(template: Mapping[str, Any]) -> Object:
    """The user's template, with one variable more. What it removes (null) it still removes."""
    pod = template.get("spec") or {}
    containers = [*(pod.get("containers") or [])]
    if not any(one["name"] == CONTAINER for one in containers):
        containers.append({"name": CONTAINER})
    return {**template, "spec": {**pod, "containers": [_with_faults(one) for one in containers]}}


def _with_faults(container: Mapping[str, Any]) -> Object:
    if container["name"] != CONTAINER:
        return {**container}
    kept = [entry for entry in container.get("env") or [] if entry["name"] != ALLOWS_FAULTS]
    return {**container, "env": [*kept, _FAULTS]}
