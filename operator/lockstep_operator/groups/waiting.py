"""Since when a group waits for the same thing (pure).

What a group waits for may come by itself: a node, an image, a quota. Only when nothing has moved for the progress
deadline is it a person's turn. What moves restarts the clock: another thing to wait for, other pods, service.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from lockstep_operator.groups.group import Group
from lockstep_operator.types.timestamps import format_rfc3339, parse_rfc3339

RECOVERING: Final = "Recovering"
# An engine that ends again and again is now starting, now loading: that is no service yet.
COMING_BACK: Final = frozenset({"Starting", "Loading", "Unreachable", "OutOfMemory", "SpawnFailed"})
VAGUE: Final = frozenset({"Starting", "Unreachable"})  # seen between two looks at what is truly wrong
PLACEMENT: Final = frozenset({"Unschedulable", "SchedulingGated", "PodsRefused"})


@dataclass(frozen=True, slots=True)
class Waiting:
    """`since` in unix seconds, `revision` of the pods that the wait began with."""

    reason: str
    since: float
    revision: str


def waiting_for(reason: str, group: Group, before: Waiting | None, deadline: float, now: float) -> Waiting | None:
    """`reason` is what keeps the group from serving now; empty when nothing does."""
    if not reason:
        return None
    fresh = Waiting(reason, float(int(now)), group.revision)
    if before is None or (before.revision != group.revision and reason not in PLACEMENT):
        return fresh
    if reason == before.reason or (before.reason == RECOVERING and reason in COMING_BACK):
        return before
    if before.reason in PLACEMENT and _is_placed(group):
        return fresh
    if reason in VAGUE and not _has_run(group, deadline, now):
        return before
    return fresh


def recovering_since(block: Mapping[str, Any]) -> float | None:
    """Since when the group has been trying to serve again, whatever it says in between; None when it isn't."""
    waiting = from_status(block.get("waiting"))
    return waiting.since if waiting is not None and waiting.reason == RECOVERING else None


def unplaced(block: Mapping[str, Any], revision: str) -> bool:
    """Whether the group has found no place since before it was of this revision, so that nothing is learned from it."""
    waiting = from_status(block.get("waiting"))
    return waiting is not None and waiting.reason in PLACEMENT and waiting.revision not in ("", revision)


def to_status(waiting: Waiting | None) -> dict[str, Any] | None:
    if waiting is None:
        return None
    return {"reason": waiting.reason, "since": format_rfc3339(waiting.since), "revision": waiting.revision}


def from_status(block: Mapping[str, Any] | None) -> Waiting | None:
    if not block or "since" not in block:
        return None
    return Waiting(block.get("reason", ""), parse_rfc3339(block["since"]), block.get("revision", ""))


def _is_placed(group: Group) -> bool:
    """Whether every pod has its node."""
    return len(group.pods) == group.wanted and all(pod.raw["spec"].get("nodeName") for pod in group.pods)


def _has_run(group: Group, seconds: float, now: float) -> bool:
    """All pods, undisturbed."""
    starts = [pod.started for pod in group.pods]
    return len(starts) == group.wanted and all(start is not None and now - start >= seconds for start in starts)
