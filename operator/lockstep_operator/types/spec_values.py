"""Values that several parts of a spec have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lockstep_operator.types.durations import duration


class SpecError(ValueError):
    """The spec can't be served as written; the message says what to change. The CRD's schema refuses most."""


@dataclass(frozen=True, slots=True)
class SecretKey:
    name: str
    key: str


def seconds(block: Mapping[str, Any], name: str) -> float | None:
    if name not in block:
        return None
    try:
        return duration(block[name])
    except ValueError as error:
        raise SpecError(f"{name}: {error}") from None


def secret_key(reference: Mapping[str, Any] | None) -> SecretKey | None:
    return SecretKey(reference["name"], reference["key"]) if reference else None
