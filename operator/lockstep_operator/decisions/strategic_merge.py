"""Lays a user's part of a pod template over ours.

Maps are merged, named lists are merged by their key, other lists are replaced, and null removes. It is what `kubectl
patch` does with a strategic merge, for the lists of a PodSpec; entries of env and volumes are replaced whole, since
merging `value` with `valueFrom`, or two kinds of volume, makes neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

MERGE_KEYS: Final[Mapping[str, str]] = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "volumeMounts": "mountPath",
    "ports": "containerPort",
    "imagePullSecrets": "name",
}
_WHOLE: Final = frozenset({"env", "volumes"})


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A new mapping: `over` laid over `base`. Neither is changed."""
    merged = dict(base)
    for name, value in over.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = _value(name, base.get(name), value)
    return merged


def _value(name: str, base: Any, over: Any) -> Any:
    if isinstance(over, Mapping):
        return merge(base if isinstance(base, Mapping) else {}, over)
    key = MERGE_KEYS.get(name)
    if key and isinstance(base, list) and isinstance(over, list) and all(isinstance(item, Mapping) for item in over):
        return _named(base, over, key, whole=name in _WHOLE)
    return over


def _named(base: list[Any], over: list[Any], key: str, *, whole: bool) -> list[Any]:
    merged = {item[key]: item for item in base}
    for position, item in enumerate(over):
        identity = item.get(key, ("unnamed", position))  # left for the API server to refuse
        old = merged.get(identity)
        merged[identity] = item if whole or old is None else merge(old, item)
    return list(merged.values())
