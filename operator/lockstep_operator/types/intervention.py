"""What a person takes out of the operator's hands, by annotations of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from lockstep_operator.types.names import FENCED_ANNOTATION, PAUSED_ANNOTATION

_SWITCH: Final = {"": False, "false": False, "true": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class Intervention:
    """`flaw`: what is wrong with an annotation, as a sentence; it then counts for nothing."""

    paused: bool = False
    fenced: frozenset[int] = frozenset()  # groups
    flaw: str = ""


def parse_intervention(annotations: Mapping[str, str]) -> Intervention:
    paused, fenced = annotations.get(PAUSED_ANNOTATION, ""), annotations.get(FENCED_ANNOTATION, "")
    if paused not in _SWITCH:
        return Intervention(flaw=f"annotation {PAUSED_ANNOTATION} must be true or false, and is {paused[:80]!r}")
    groups = [part.strip() for part in fenced.split(",")] if fenced.strip() else []
    if not all(part.isascii() and part.isdigit() for part in groups):
        words = f"must list numbers of groups such as 1,3, and is {fenced[:80]!r}"
        return Intervention(paused=_SWITCH[paused], flaw=f"annotation {FENCED_ANNOTATION} {words}")
    return Intervention(paused=_SWITCH[paused], fenced=frozenset(map(int, groups)))
