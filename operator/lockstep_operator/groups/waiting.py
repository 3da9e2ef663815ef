"""Since when a group waits for the same thing (pure).

What a group waits for may come by itself: a node, an image, a quota. Only when nothing has moved for the progress
deadline is it a person's turn. What moves restarts the clock: another thing to wait for, other pods, service.
"""

from __future__ import annotations

from typing import Final

from lockstep_operator.groups.group import Group
from lockstep_operator.types.model_status import Waiting
from lockstep_operator.types.reasons import Reason

# An engine that ends again and again is now starting, now loading: that is no service yet.
RESTARTING: Final = frozenset(
    {Reason.STARTING, Reason.LOADING, Reason.UNREACHABLE, Reason.OUT_OF_MEMORY, Reason.SPAWN_FAILED}
)
NOT_SERVING_AGAIN: Final = frozenset({Reason.RECOVERING, Reason.RECOVERY_EXHAUSTED})  # the latter tries on, seldom
VAGUE: Final = frozenset({Reason.STARTING, Reason.UNREACHABLE})  # seen for a moment between more telling reasons
PLACEMENT: Final = frozenset({Reason.UNSCHEDULABLE, Reason.SCHEDULING_GATED, Reason.PODS_REFUSED})


def waiting_for(reason: str, group: Group, before: Waiting | None, deadline: float, now: float) -> Waiting | None:
    """`reason` is what keeps the group from serving now; empty when nothing does."""
    if not reason:
        return None
    fresh = Waiting(reason, float(int(now)), group.revision)
    if before is None or (before.revision != group.revision and reason not in PLACEMENT):
        return fresh
    if reason == before.reason or (before.reason == Reason.RECOVERING and reason in RESTARTING):
        return before
    if before.reason in PLACEMENT and _is_placed(group):
        return fresh
    if reason in VAGUE and not _has_run(group, deadline, now):
        return before
    return fresh


def recovering_since(waiting: Waiting | None) -> float | None:
    """Since when the group has been trying to serve again, whatever it reports in between; None when it isn't."""
    return waiting.since if waiting is not None and waiting.reason in NOT_SERVING_AGAIN else None


def unplaced(waiting: Waiting | None, revision: str) -> bool:
    """Whether the group has found no place since before it was of this revision, so that nothing is learned from it."""
    return waiting is not None and waiting.reason in PLACEMENT and waiting.revision not in ("", revision)


def _is_placed(group: Group) -> bool:
    """Whether every pod has its node."""
    return len(group.pods) == group.wanted and all(pod.raw["spec"].get("nodeName") for pod in group.pods)


def _has_run(group: Group, seconds: float, now: float) -> bool:
    """All pods, undisturbed."""
    starts = [pod.started for pod in group.pods]
    return len(starts) == group.wanted and all(start is not None and now - start >= seconds for start in starts)
