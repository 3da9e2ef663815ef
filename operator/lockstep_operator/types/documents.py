"""Documents of the API server as frozen structs, and back: camel case, times in RFC 3339, latencies such as 12.3ms.

In structs times are unix seconds and latencies milliseconds. A field that is None has no place in a document.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import msgspec

from lockstep_operator.types.timestamps import format_rfc3339, parse_rfc3339

T = TypeVar("T")
_TIMES: Final = (
    "avoidedUntil",
    "faultTime",
    "finishedAt",
    "healthySince",
    "lastStepTime",
    "lastTransitionTime",
    "nextTryTime",
    "recoveredTime",
    "resolveRevisionAt",
    "since",
    "time",
)
_LATENCIES: Final = ("p50", "p99")
_MAPS: Final = frozenset({"avoided", "nodeFaultCounts", "phases", "spent"})  # whose keys are no fields
_Values = Mapping[str, Callable[[Any], Any]]


def _parse_ms(text: str) -> float:
    return float(text.removesuffix("ms"))


def _format_ms(milliseconds: float) -> str:
    return f"{milliseconds:.1f}ms"


_PARSERS: Final[_Values] = {**dict.fromkeys(_TIMES, parse_rfc3339), **dict.fromkeys(_LATENCIES, _parse_ms)}
_FORMATTERS: Final[_Values] = {**dict.fromkeys(_TIMES, format_rfc3339), **dict.fromkeys(_LATENCIES, _format_ms)}


def camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join("UID" if part == "uid" else "ID" if part == "id" else part.capitalize() for part in rest)


def read(document: Mapping[str, Any], kind: type[T]) -> T:
    """Fields that `kind` doesn't have are left out. Raises ValueError and msgspec.ValidationError for what is
    malformed."""
    return msgspec.convert(_each(document, _PARSERS), kind)


def write(value: msgspec.Struct) -> dict[str, Any]:
    document: dict[str, Any] = _each(msgspec.to_builtins(value), _FORMATTERS)
    return document


def _each(value: Any, convert: _Values) -> Any:
    if isinstance(value, Mapping):
        return {name: _field(name, item, convert) for name, item in value.items() if item is not None}
    return [_each(item, convert) for item in value] if isinstance(value, list | tuple) else value


def _field(name: str, value: Any, convert: _Values) -> Any:
    if name in _MAPS:
        return value
    return convert[name](value) if name in convert else _each(value, convert)
