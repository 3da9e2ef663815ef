"""What fails within pods: processes killed for lack of memory, processes that can't be started (pure).

A process that the kernel kills every few seconds is reported every few minutes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from lockstep_operator.groups.group import Group
from lockstep_operator.types.model_status import ProcessFailure
from lockstep_operator.types.names import CONTAINER
from lockstep_operator.types.observed import Pod
from lockstep_operator.types.reasons import Reason
from lockstep_operator.types.timestamps import parse_rfc3339
from lockstep_runtime.protocol.status import GroupStatus

RECENT_SECONDS: Final = 600.0  # so long it may be the reason for what is wrong now
REPEAT_SECONDS: Final = 300.0  # the same is not reported again before
MESSAGE_LIMIT: Final = 500


def newest_failure(
    group: Group, status: GroupStatus | None, before: ProcessFailure | None, now: float
) -> ProcessFailure | None:
    """The newest, or `before` where that is the same and recent; None when there has been none for a while."""
    found = [*_killed(group), *_reported(group, status)]
    newest = max((one for one in found if now - one.time < RECENT_SECONDS), key=lambda one: one.time, default=None)
    if newest is None:
        return None
    same = before is not None and before.reason == newest.reason and newest.time - before.time < REPEAT_SECONDS
    return before if same else newest


def _reported(group: Group, status: GroupStatus | None) -> Iterator[ProcessFailure]:
    """By the supervisors, who see what happens within a pod."""
    names = {pod.index: pod.name for pod in group.pods}
    for problem in status.pod_problems if status else ():
        text = f"pod {names.get(problem.pod_index, problem.pod_index)}: {problem.message}"
        yield ProcessFailure(str(problem.reason), text[:MESSAGE_LIMIT], float(int(problem.at)))


def _killed(group: Group) -> Iterator[ProcessFailure]:
    """By the kernel, as the kubelet saw it: a container's first process."""
    for pod in group.pods:
        for container in pod.containers:
            for state in (container.get("state") or {}, container.get("lastState") or {}):
                ended = state.get("terminated") or {}
                if ended.get("reason") == "OOMKilled" and ended.get("finishedAt"):
                    at = parse_rfc3339(ended["finishedAt"])
                    yield ProcessFailure(Reason.OUT_OF_MEMORY, _message(pod, container["name"]), at)


def _message(pod: Pod, name: str) -> str:
    containers = (pod.raw.get("spec") or {}).get("containers") or []
    one: Mapping[str, Any] = next((container for container in containers if container.get("name") == name), {})
    limit = ((one.get("resources") or {}).get("limits") or {}).get("memory")
    bound = f"its memory limit is {limit}" if limit else "it has no memory limit, so its node was short of memory"
    which = "" if name == CONTAINER else f"container {name} of "
    return f"{which}pod {pod.name} was killed for lack of memory; {bound}"
