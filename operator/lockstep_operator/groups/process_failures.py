"""What pods complain of: killed for want of memory, processes that can't be started (pure).

A kernel that kills a pod's process every few seconds is told of every few minutes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from lockstep_operator.groups.group import Group
from lockstep_operator.types.names import CONTAINER
from lockstep_operator.types.observed import Pod
from lockstep_operator.types.timestamps import format_rfc3339, parse_rfc3339
from lockstep_runtime.protocol.status import GroupStatus

RECENT_SECONDS: Final = 600.0  # so long it may be the reason for what is wrong now
AGAIN_SECONDS: Final = 300.0  # the same is not told anew before
MESSAGE_LIMIT: Final = 500
_OUT_OF_MEMORY: Final = "OutOfMemory"


@dataclass(frozen=True, slots=True)
class ProcessFailure:
    """`at` in unix seconds, `reason` in one word."""

    reason: str
    message: str
    at: float


def newest_failure(
    group: Group, status: GroupStatus | None, before: ProcessFailure | None, now: float
) -> ProcessFailure | None:
    """The newest, or the one that was told where that was lately; None when there has been none for a while."""
    found = [*_killed(group), *_said(group, status)]
    recent = [one for one in found if now - one.at < RECENT_SECONDS]
    newest = max(recent, key=lambda one: one.at, default=None)
    if newest is None:
        return None
    same = before is not None and before.reason == newest.reason and newest.at - before.at < AGAIN_SECONDS
    return before if same else newest


def to_status(complaint: ProcessFailure | None) -> dict[str, Any] | None:
    if complaint is None:
        return None
    return {"reason": complaint.reason, "message": complaint.message, "time": format_rfc3339(complaint.at)}


def from_status(block: Mapping[str, Any] | None) -> ProcessFailure | None:
    return (
        ProcessFailure(block["reason"], block["message"], parse_rfc3339(block["time"]))
        if block and "time" in block
        else None
    )


def _said(group: Group, status: GroupStatus | None) -> Iterator[ProcessFailure]:
    """By the supervisors, who see what happens within a pod."""
    names = {pod.index: pod.name for pod in group.pods}
    for problem in status.pod_problems if status else ():
        words = f"pod {names.get(problem.pod_index, problem.pod_index)}: {problem.message}"
        yield ProcessFailure(str(problem.reason), words[:MESSAGE_LIMIT], float(int(problem.at)))


def _killed(group: Group) -> Iterator[ProcessFailure]:
    """By the kernel, as the kubelet saw it: a container's first process."""
    for pod in group.pods:
        for container in (pod.raw.get("status") or {}).get("containerStatuses") or []:
            for state in (container.get("state") or {}, container.get("lastState") or {}):
                ended = state.get("terminated") or {}
                if ended.get("reason") == "OOMKilled" and ended.get("finishedAt"):
                    yield ProcessFailure(
                        _OUT_OF_MEMORY, _words(pod, container["name"]), parse_rfc3339(ended["finishedAt"])
                    )


def _words(pod: Pod, name: str) -> str:
    containers = (pod.raw.get("spec") or {}).get("containers") or []
    one: Mapping[str, Any] = next((container for container in containers if container.get("name") == name), {})
    limit = ((one.get("resources") or {}).get("limits") or {}).get("memory")
    bound = f"its memory limit is {limit}" if limit else "it has no memory limit, so its node was short of memory"
    which = "" if name == CONTAINER else f"container {name} of "
    return f"{which}pod {pod.name} was killed for want of memory; {bound}"
