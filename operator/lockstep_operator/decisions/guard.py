"""One decision that fails by a fault of the operator's own must not hold up the others, recovery least of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bug:
    """A decision that failed."""

    where: str
    error: Exception

    @property
    def sentence(self) -> str:
        text = str(self.error)[:300] or "no message"
        return f"the operator can't decide about {self.where} ({type(self.error).__name__}: {text}): see its log"


@dataclass(frozen=True, slots=True)
class Guard:
    bugs: list[Bug] = field(default_factory=list)

    def __call__(self, where: str, decision: Callable[[], T], otherwise: T) -> T:
        """What was decided; `otherwise`, when that raised."""
        try:
            return decision()
        except Exception as error:
            self.bugs.append(Bug(where=where, error=error))
            return otherwise
