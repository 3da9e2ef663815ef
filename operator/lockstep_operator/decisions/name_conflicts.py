"""Names that a model needs and that other owners' objects have (pure): these are never taken over, nor deleted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lockstep_operator.groups.group import is_ours
from lockstep_operator.types.names import KIND
from lockstep_operator.types.observed import Observed, controller, expected_names, wanted_groups
from lockstep_operator.types.spec import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class NameConflicts:
    """Names that the model needs and that something else has. `groups` can't exist because of it."""

    sentence: str = ""
    ends: bool = False  # by itself
    whole: bool = False  # no group can be
    groups: frozenset[int] = frozenset()

    @classmethod
    def of(cls, model: Model, observed: Observed) -> NameConflicts:
        """What the model must leave alone."""
        found = [*_foreign(model, observed)]
        remnant = next(
            (text for kind, name, owner, _ in found if (text := _previous_owner_conflict(model, kind, name, owner))),
            "",
        )
        if not found:
            return cls()
        kind, name, owner, _ = found[0]
        whose = f"belongs to {owner['kind']} {owner['name']}" if owner else "isn't Lockstep's"
        return cls(
            sentence=remnant or f"{kind} {name} exists and {whose}: delete it, or give the model another name",
            ends=bool(remnant),
            whole=any(group is None for *_, group in found),
            groups=frozenset(group for *_, group in found if group is not None),
        )


def _foreign(model: Model, observed: Observed) -> Iterator[tuple[str, str, Mapping[str, Any] | None, int | None]]:
    """Kind, name and owner of what has a name that the model needs and isn't its own; and whose group's name it is."""
    for kind, name, group in expected_names(model, wanted_groups(model, observed.status)):
        child = observed.child(kind, name)
        if child is not None and not is_ours(model, child):
            yield kind, name, controller(child), group


def _previous_owner_conflict(model: Model, kind: str, name: str, owner: Mapping[str, Any] | None) -> str:
    if owner is not None and owner.get("kind") == KIND and owner.get("name") == model.name:
        return f"{kind} {name} of a deleted model of the same name still exists: Lockstep waits until it is gone"
    return ""
