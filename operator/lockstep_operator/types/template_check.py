"""Whether `spec.template` has the shape that a pod template must have, as far as the operator reads it (pure).

The CRD takes whatever is in `template.spec`: a PodSpec has more fields than a schema may hold. What the operator itself
doesn't read is the API server's to refuse.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class Whole:
    """A whole number of at least 0. YAML's `60s` or `"60"` is none."""


@dataclass(frozen=True, slots=True)
class Words:
    """Text that isn't empty."""


@dataclass(frozen=True, slots=True)
class Anything:
    """Left to the API server."""


@dataclass(frozen=True, slots=True)
class Map:
    """`fields` as far as they are read; others are left to the API server. `needs` can't be left out."""

    fields: Mapping[str, Shape]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class List:
    """Each item is of `item`. `named` says what tells the items apart."""

    item: Map
    named: str = ""


Shape = Whole | Words | Anything | Map | List

_NAMED: Final = Map({"name": Words()}, needs=("name",))
_CONTAINER: Final = Map(
    {
        "name": Words(),
        "env": List(_NAMED, named="name"),
        "ports": List(Map({"containerPort": Whole()}, needs=("containerPort",))),
        "volumeMounts": List(Map({"mountPath": Words()}, needs=("mountPath",)), named="mountPath"),
        "resources": Map({"limits": Map({}), "requests": Map({})}),
    },
    needs=("name",),
)
_TERM: Final = Map({"matchFields": List(Map({}))})
_AFFINITY: Final = Map(
    {"nodeAffinity": Map({"requiredDuringSchedulingIgnoredDuringExecution": Map({"nodeSelectorTerms": List(_TERM)})})}
)
_SPEC: Final = Map(
    {
        "terminationGracePeriodSeconds": Whole(),
        "containers": List(_CONTAINER, named="name"),
        "initContainers": List(_CONTAINER, named="name"),
        "volumes": List(_NAMED, named="name"),
        "imagePullSecrets": List(_NAMED, named="name"),
        "affinity": _AFFINITY,
        "tolerations": List(Map({})),
    }
)
TEMPLATE: Final = Map({"metadata": Map({"labels": Map({}), "annotations": Map({})}), "spec": _SPEC})
_KEPT: Final = frozenset({"spec.containers", "metadata", "spec"})  # what null can't remove


def flaw(template: Any) -> str:
    """What is wrong with it first, in a sentence that names the field; empty if nothing is."""
    return next((f"template{words}" for words in _flaws("", template, TEMPLATE)), "")


def _flaws(path: str, value: Any, shape: Shape) -> Iterator[str]:
    if value is None:  # it removes the field
        if path.lstrip(".") in _KEPT:
            yield f"{path} is null: it can't be removed"
        return
    match shape:
        case Whole():
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                yield f"{path} must be a whole number of at least 0, and is {_short(value)}"
        case Words():
            if not isinstance(value, str) or not value:
                yield f"{path} must be text, and is {_short(value)}"
        case Map():
            yield from _map_flaws(path, value, shape)
        case List():
            yield from _list_flaws(path, value, shape)


def _map_flaws(path: str, value: Any, shape: Map) -> Iterator[str]:
    if not isinstance(value, Mapping):
        yield f"{path} must be a map, and is {_short(value)}"
        return
    for name in shape.needs:
        if value.get(name) is None:
            yield f"{path}.{name} is missing"
    for name, inner in shape.fields.items():
        if name in value:
            yield from _flaws(f"{path}.{name}", value[name], inner)


def _list_flaws(path: str, value: Any, shape: List) -> Iterator[str]:
    if not isinstance(value, list):
        yield f"{path} must be a list, and is {_short(value)}"
        return
    seen: set[str] = set()
    for position, item in enumerate(value):
        where = f"{path}[{position}]"
        if item is None:
            yield f"{where} is null: an item can't be"
            continue
        yield from _flaws(where, item, shape.item)
        name = item.get(shape.named) if shape.named and isinstance(item, Mapping) else None
        if isinstance(name, str) and name in seen:
            yield f"{where}.{shape.named} is {_short(name)}, as another item's is"
        if isinstance(name, str):
            seen.add(name)


def _short(value: Any) -> str:
    kind = {dict: "a map", list: "a list", bool: "a boolean"}.get(type(value))
    text = f"{kind} ({value})" if kind else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
