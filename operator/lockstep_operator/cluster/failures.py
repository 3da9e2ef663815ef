"""Writes that the API server rejected: when each is retried, and whether it needs a person.

Kept in memory only: an operator that restarts tries each once more, and so learns the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Final

from lockstep_operator.backoff import backoff
from lockstep_operator.cluster.client import KubeError
from lockstep_operator.types.model_status import ModelStatus
from lockstep_operator.types.observed import ObjectRef
from lockstep_operator.types.reasons import ConditionType, Reason

RETRY_FIRST: Final = 0.5
RETRY_MOST: Final = 60.0
REFUSED_FIRST: Final = 2.0
REFUSED_MOST: Final = 300.0
RETRYING_SECONDS: Final = 10.0  # what fails for so long is reported

_RETRIED: Final = "rejected a change, which is retried"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One write that fails each time. Times are unix seconds."""

    asked: str  # digest of what was to be written: another content is another write
    purpose: str
    error: KubeError
    count: int
    since: float
    due: float  # not retried before

    @property
    def permanent(self) -> bool:
        return not self.error.transient

    @property
    def sentence(self) -> str:
        verb = "refuses a change" if self.permanent else _RETRIED
        return f"the API server {verb} ({self.purpose}): {self.error}"


@dataclass(slots=True)
class Failures:
    """Of one model."""

    now: Callable[[], float]
    of: dict[ObjectRef, Failure] = field(default_factory=dict)

    def waits(self, target: ObjectRef, wish: object) -> bool:
        """Whether this very write failed so recently that it isn't retried yet."""
        known = self.of.get(target)
        return known is not None and known.asked == _digest(wish) and self.now() < known.due

    def failed(self, target: ObjectRef, wish: object, purpose: str, error: KubeError) -> Failure:
        known, asked, now = self.of.get(target), _digest(wish), self.now()
        same = known if known and known.asked == asked else None
        count = same.count + 1 if same else 1
        first, most = (RETRY_FIRST, RETRY_MOST) if error.transient else (REFUSED_FIRST, REFUSED_MOST)
        failure = Failure(
            asked=asked,
            purpose=purpose,
            error=error,
            count=count,
            since=same.since if same else now,
            due=now + backoff(count, first, most),
        )
        self.of[target] = failure
        return failure

    def succeeded(self, target: ObjectRef) -> None:
        self.of.pop(target, None)

    def keep(self, wanted: Iterable[ObjectRef]) -> None:
        """Forget writes that are no longer decided."""
        kept = set(wanted)
        for target in [target for target in self.of if target not in kept]:
            del self.of[target]

    @property
    def due(self) -> float | None:
        """Seconds until the next retry; None when nothing fails."""
        return min((max(0.0, failure.due - self.now()) for failure in self.of.values()), default=None)

    @property
    def refused(self) -> str:
        """The first permanent rejection as a sentence; empty if there is none."""
        return next((failure.sentence for _, failure in sorted(self.of.items()) if failure.permanent), "")

    def retrying(self, before: ModelStatus) -> Failure | None:
        """A write that has failed for long and may succeed yet. `before` is the status as last written: what it reports
        stays reported until it is over, also by an operator that has just started."""
        reported = reported_since(before)
        known = [failure for _, failure in sorted(self.of.items()) if not failure.permanent]
        if reported is not None:
            known = [replace(failure, since=min(failure.since, reported)) for failure in known]
        return next((failure for failure in known if self.now() - failure.since >= RETRYING_SECONDS), None)


def reported_since(before: ModelStatus) -> float | None:
    """Since when the status has said that a write fails; None if it doesn't."""
    ready = before.condition(ConditionType.READY)
    if ready is None or ready.reason not in (Reason.RETRYING, Reason.PROGRESS_DEADLINE_EXCEEDED):
        return None
    return ready.last_transition_time - RETRYING_SECONDS if _RETRIED in ready.message else None


def _digest(wish: object) -> str:
    return hashlib.sha256(json.dumps(wish, sort_keys=True, default=str).encode()).hexdigest()
