"""The writes that may be decided, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lockstep_operator.types.model_status import Tokens
from lockstep_operator.types.observed import ObjectRef


@dataclass(frozen=True, slots=True)
class MakeTokens:
    """Make the Secrets with the model's tokens. One of the operator's that exists is replaced, since nobody may read
    what it holds. `made` is to be remembered of it.
    """

    name: str  # of the group's
    made: Tokens
    reason: str
    groups_too: bool = True  # that may be missing; one that exists is left alone, since pods have it
    needs: tuple[ObjectRef, ...] = ()

    @property
    def target(self) -> ObjectRef:
        return ("Secret", self.name)

    @property
    def wish(self) -> object:
        return f"tokens {self.made.key} {self.made.id}"


@dataclass(frozen=True, slots=True)
class Apply:
    kind: str
    manifest: Mapping[str, Any] = field(repr=False)
    reason: str
    repairs: str = ""  # what someone changed, when that is why
    uid: str = ""  # of the object as it was seen; empty when there was none
    version: str = ""  # its resource version; without an object, the model's
    needs: tuple[ObjectRef, ...] = ()  # writes without which this one must not be

    @property
    def name(self) -> str:
        return str(self.manifest["metadata"]["name"])

    @property
    def target(self) -> ObjectRef:
        return (self.kind, self.name)

    @property
    def wish(self) -> object:
        return self.manifest


@dataclass(frozen=True, slots=True)
class Delete:
    """`grace` in seconds; None leaves it to the object, 0 doesn't wait for anybody."""

    kind: str
    name: str
    uid: str
    reason: str
    grace: int | None = None
    needs: tuple[ObjectRef, ...] = ()

    @property
    def target(self) -> ObjectRef:
        return (self.kind, self.name)

    @property
    def wish(self) -> object:
        return f"delete {self.uid} {self.grace}"


Action = MakeTokens | Apply | Delete
