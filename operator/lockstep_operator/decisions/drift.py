"""Where a live object differs from its manifest: only fields that the operator sets count.

The API server adds defaults, so plain equality won't do. Maps may have more entries, except label selectors. Lists may
not, except owners: one more container, variable, port or rule is drift. Named lists may be in any order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from lockstep_operator.types.quantity import quantity

_KEYS: Final[Mapping[str, str]] = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "volumeMounts": "mountPath",
    "imagePullSecrets": "name",
    "ownerReferences": "uid",
}
_OPEN_LISTS: Final = frozenset({"ownerReferences"})
_EXACT_MAPS: Final = frozenset({"selector", "podSelector", "namespaceSelector", "matchLabels"})
_QUANTITIES: Final = frozenset({"limits", "requests"})


def differences(desired: Mapping[str, Any], live: Mapping[str, Any]) -> frozenset[str]:
    """`path: live value instead of desired value` for every desired field that `live` lacks or has otherwise."""
    return frozenset(_map("", desired, live))


def _map(path: str, desired: Mapping[str, Any], live: Mapping[str, Any]) -> Iterator[str]:
    for name, value in desired.items():
        yield from _any(f"{path}.{name}" if path else name, name, value, live.get(name))


def _any(path: str, name: str, desired: Any, live: Any) -> Iterator[str]:
    if isinstance(desired, Mapping):
        yield from _nested(path, name, desired, live)
    elif isinstance(desired, list):
        yield from _list(path, name, desired, live)
    elif not (_same_quantity if name == "sizeLimit" else _same)(desired, live):
        yield f"{path}: {_short(live)} instead of {_short(desired)}"


def _nested(path: str, name: str, desired: Mapping[str, Any], live: Any) -> Iterator[str]:
    if not isinstance(live, Mapping):
        if desired or live is not None:  # the API server drops some empty maps
            yield f"{path}: {_short(live)} instead of {_short(desired)}"
        return
    if name in _QUANTITIES:
        yield from _quantities(path, desired, live)
        return
    yield from _map(path, desired, live)
    if name in _EXACT_MAPS:
        yield from (f"{path}.{extra}: {_short(live[extra])} is too much" for extra in live.keys() - desired.keys())


def _list(path: str, name: str, desired: list[Any], live: Any) -> Iterator[str]:
    if not isinstance(live, list):
        if desired:
            yield f"{path}: {_short(live)} instead of {len(desired)} entries"
        return
    key = _KEYS.get(name)
    if key and all(isinstance(item, Mapping) for item in desired + live):
        by_key = {item.get(key): item for item in live}
        for item in desired:
            yield from _any(f"{path}[{item.get(key)}]", "", item, by_key.pop(item.get(key), None))
        if name not in _OPEN_LISTS:
            yield from (f"{path}[{extra}] is too much" for extra in by_key)
        return
    if len(desired) != len(live):
        yield f"{path}: {len(live)} entries instead of {len(desired)}"
        return
    for position, (want, have) in enumerate(zip(desired, live, strict=True)):
        yield from _any(f"{path}[{position}]", "", want, have)


def _quantities(path: str, desired: Mapping[str, Any], live: Mapping[str, Any]) -> Iterator[str]:
    for name, value in desired.items():
        if not _same_quantity(value, live.get(name)):
            yield f"{path}.{name}: {_short(live.get(name))} instead of {_short(value)}"


def _same(desired: Any, live: Any) -> bool:
    return bool(desired == live) or (
        live is None and desired in ("", 0, False)
    )  # the API server leaves out what is empty


def _same_quantity(desired: Any, live: Any) -> bool:
    return bool(desired == live) or (quantity(desired) is not None and quantity(desired) == quantity(live))


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
