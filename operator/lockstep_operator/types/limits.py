"""What a namespace allows a container: its LimitRanges (pure)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from lockstep_operator.types.quantity import quantity


@dataclass(frozen=True, slots=True)
class Limits:
    """By resource, as quantities: the most and the least that a container may ask for, and the limit that one gets
    which has none."""

    most: Mapping[str, str] = field(default_factory=dict)
    default: Mapping[str, str] = field(default_factory=dict)
    least: Mapping[str, str] = field(default_factory=dict)


def limits_of(ranges: Iterable[Mapping[str, Any]]) -> Limits:
    """Of a namespace's LimitRanges, as far as they are about containers."""
    entries = [
        entry
        for item in ranges
        for entry in (item.get("spec") or {}).get("limits") or []
        if entry.get("type") == "Container"
    ]
    return Limits(
        most=_extreme([entry.get("max") or {} for entry in entries], smallest=True),
        default=_extreme([entry.get("default") or {} for entry in entries], smallest=True),
        least=_extreme([entry.get("min") or {} for entry in entries], smallest=False),
    )


def number(value: object) -> Decimal:
    """What isn't a quantity is left for the API server to refuse."""
    found = quantity(value)
    return Decimal("Infinity") if found is None else found


def _extreme(maps: Iterable[Mapping[str, Any]], *, smallest: bool) -> dict[str, str]:
    found: dict[str, str] = {}
    for entry in maps:
        for name, value in entry.items():
            known = found.get(name)
            if known is None or (number(value) < number(known)) is smallest:
                found[name] = str(value)
    return found
