"""The writes that may be decided, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lockstep_operator.types.observed import ObjectRef


@dataclass(frozen=True, slots=True)
class CreateToken:
    """Make the Secret, with a token drawn when it is made; an existing one is left alone."""

    name: str
    reason: str
    needs: tuple[ObjectRef, ...] = ()

    @property
    def target(self) -> ObjectRef:
        return ("Secret", self.name)

    @property
    def wish(self) -> object:
        return "create"


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


Action = CreateToken | Apply | Delete
