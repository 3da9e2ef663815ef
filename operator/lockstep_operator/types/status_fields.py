"""The paths of all fields of the status that this operator may write, read off its types."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec

from lockstep_operator.types.model_status import ModelStatus
from lockstep_operator.types.recovery_state import RecoveryAction, RecoveryState, Rung

Path = tuple[str, ...]  # names from the top of the object, without the keys of lists
# As `recovery_state.flat` lays them out.
_RECOVERY: Final[Mapping[str, Sequence[Path]]] = {
    "action": [(field.encode_name,) for field in msgspec.structs.fields(RecoveryAction)],
    "spent": [("spent",), *(("spent", rung.field) for rung in Rung)],
    "nodeFaultCounts": [("nodes",), ("nodes", "name"), ("nodes", "faults")],
    "avoided": [("nodes", "avoidedUntil")],
}


def written_fields() -> frozenset[Path]:
    return frozenset(_fields(ModelStatus, ("status",)))


def _fields(kind: type[msgspec.Struct], at: Path) -> Iterator[Path]:
    for field in msgspec.structs.fields(kind):
        if kind is RecoveryState and field.encode_name in _RECOVERY:
            yield from ((*at, *path) for path in _RECOVERY[field.encode_name])
            continue
        path = (*at, field.encode_name)
        yield path
        for inner in _structs(field.type):
            yield from _fields(inner, path)


def _structs(kind: Any) -> Iterator[type[msgspec.Struct]]:
    """In an annotation such as `tuple[RankSummary, ...] | None`."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        yield kind
    for inner in typing.get_args(kind):
        yield from _structs(inner)
