"""What keeps a group's pods from running, in sentences a person can act on (pure)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from lockstep_operator.groups.group import Group
from lockstep_operator.types.names import QUEUE_FINALIZER
from lockstep_operator.types.observed import Pod
from lockstep_operator.types.reasons import Reason
from lockstep_operator.types.timestamps import parse_rfc3339

FORCE_DELETE_SECONDS: Final = 60.0  # past its grace, a pod whose node doesn't respond is lost
PENDING_SECONDS: Final = 5.0  # the Events of a pod that hasn't started by then are read
OVERDUE_SECONDS: Final = 30.0  # past its grace, a terminating pod is stuck
_IMAGE: Final = frozenset({"ImagePullBackOff", "ErrImagePull", "InvalidImageName", "ErrImageNeverPull"})
_CONFIG: Final = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError"})
_MOUNT: Final = ("FailedMount", "FailedAttachVolume", "FailedMapVolume")


@dataclass(frozen=True, slots=True)
class PodIssue:
    """`heals`: new pods may fix it, so recovery doesn't wait for it to pass."""

    reason: Reason
    message: str
    heals: bool = False
    pod: Pod | None = None


def needs_events(groups: Sequence[Group], now: float) -> list[str]:
    """UIDs of pods and StatefulSets whose Events must be read to explain what is wrong."""
    return [uid for group in groups for uid in _needs_events(group, now)]


def _needs_events(group: Group, now: float) -> Iterator[str]:
    if _lacks_pods(group, now):
        yield group.uid
    for pod in group.pods:
        if pod.phase == "Pending" and now - pod.created > PENDING_SECONDS:
            yield pod.uid


def find_issue(group: Group, warnings: Mapping[str, str], now: float) -> PodIssue | None:
    """The first issue that may need a person; None when there is none."""
    found = [one for pod in group.pods if (one := _of_pod(pod, warnings.get(pod.uid, ""), now))]
    if found:  # what new pods may fix only where nothing else is wrong
        return next((one for one in found if not one.heals), found[0])
    if _lacks_pods(group, now) and (warning := warnings.get(group.uid)):
        return PodIssue(Reason.PODS_REFUSED, f"pods of group {group.index} can't be created: {warning}")
    return None


def node_unreachable(pod: Pod) -> bool:
    """Whether its node has stopped reporting, by what the control plane wrote to the pod: the node controller sets
    Ready to False without a reason, which a kubelet always gives, and evicts the pod later."""
    ready, disruption = pod.conditions.get("Ready", {}), pod.conditions.get("DisruptionTarget", {})
    evicted = disruption.get("status") == "True" and disruption.get("reason") == "DeletionByTaintManager"
    return evicted or (ready.get("status") == "False" and not ready.get("reason"))


def should_force_delete(pod: Pod, now: float) -> bool:
    """Whether it should have terminated long ago on a node that doesn't respond. Deleting it from the API server lets
    its successor start; if it still runs, epochs and the group's token fence it off."""
    return (
        pod.deleting is not None
        and now - pod.deleting > FORCE_DELETE_SECONDS
        and node_unreachable(pod)
        and not _holding(pod)
    )


def _holding(pod: Pod) -> list[str]:
    """Finalizers that keep a deleted pod. A queue's doesn't: whoever set it removes it once the pod is deleted."""
    return [name for name in pod.raw["metadata"].get("finalizers") or [] if name != QUEUE_FINALIZER]


def _lacks_pods(group: Group, now: float) -> bool:
    if group.workload is None or group.deleting or group.strays:
        return False
    return (
        len(group.pods) < group.wanted
        and now - parse_rfc3339(group.workload["metadata"]["creationTimestamp"]) > PENDING_SECONDS
    )


def _of_pod(pod: Pod, warning: str, now: float) -> PodIssue | None:
    if pod.deleting is not None:
        return _ending(pod, now)
    if pod.phase == "Running" and node_unreachable(pod):
        text = f"node {pod.node} of pod {pod.name} doesn't respond: Kubernetes evicts the pod if that lasts"
        return PodIssue(Reason.NODE_LOST, text)
    status = pod.raw.get("status") or {}
    for container in [*(status.get("initContainerStatuses") or []), *pod.containers]:
        if found := _of_container(pod, container):
            return found
    scheduled = pod.conditions.get("PodScheduled", {})
    if scheduled.get("status") == "False":
        return _unscheduled(pod, scheduled)
    if pod.phase == "Failed":
        text = f"pod {pod.name} has failed: {status.get('reason', '')} {status.get('message', '')}".strip()
        return PodIssue(Reason.POD_FAILED, f"{text}; its StatefulSet recreates it")
    if pod.phase == "Pending" and now - pod.created > PENDING_SECONDS and warning:
        reason = Reason.MOUNT_FAILED if warning.startswith(_MOUNT) else Reason.POD_PENDING
        return PodIssue(reason, f"pod {pod.name} can't start: {warning}")
    return None


def _unscheduled(pod: Pod, scheduled: Mapping[str, Any]) -> PodIssue:
    if scheduled.get("reason") != "SchedulingGated":
        return PodIssue(Reason.UNSCHEDULABLE, f"pod {pod.name} is unschedulable: {scheduled.get('message', '')}")
    gates = ", ".join(gate.get("name", "") for gate in (pod.raw.get("spec") or {}).get("schedulingGates") or [])
    text = f"pod {pod.name} has scheduling gates ({gates or 'unnamed'}): whoever set them must remove them"
    return PodIssue(Reason.SCHEDULING_GATED, text)


def _ending(pod: Pod, now: float) -> PodIssue | None:
    late = now - (pod.deleting or now)
    if late < OVERDUE_SECONDS:
        return None
    finalizers = ", ".join(_holding(pod))
    if node_unreachable(pod) and not finalizers:
        text = f"pod {pod.name} can't terminate, because its node {pod.node} doesn't respond: it is force-deleted soon"
        return PodIssue(Reason.NODE_LOST, text)
    cause = f"its finalizers {finalizers} hold it" if finalizers else f"is node {pod.node} alive?"
    return PodIssue(Reason.POD_STUCK, f"pod {pod.name} has not terminated within its grace period: {cause}")


def _of_container(pod: Pod, container: Mapping[str, Any]) -> PodIssue | None:
    waiting = (container.get("state") or {}).get("waiting") or {}
    reason, message = waiting.get("reason", ""), waiting.get("message", "")
    which = f"container {container['name']} of pod {pod.name}"
    if reason in _IMAGE:
        text = f"pod {pod.name} can't pull image {container.get('image', '')}: {message or reason}; its kubelet retries"
        return PodIssue(Reason.IMAGE_PULL_FAILED, text)
    if reason in _CONFIG:
        return PodIssue(Reason.CONTAINER_REFUSED, f"{which} can't be created: {message or reason}")
    if reason == "CrashLoopBackOff":
        text = f"{which} keeps exiting: {_termination_message(container)}; its kubelet restarts it with growing delays"
        return PodIssue(Reason.CRASH_LOOP, text, heals=True, pod=pod)
    return None


def termination_message(pod: Pod) -> str:
    """Why the container in a crash loop exited, by its last lines; empty for any other pod."""
    for container in pod.containers:
        if ((container.get("state") or {}).get("waiting") or {}).get("reason") == "CrashLoopBackOff":
            return _termination_message(container)
    return ""


def _termination_message(container: Mapping[str, Any]) -> str:
    ended = (container.get("lastState") or {}).get("terminated") or {}
    text = (ended.get("message") or "").strip().splitlines()
    exit_code = f"{ended.get('reason', 'ended')}, exit code {ended.get('exitCode', 'unknown')}"
    return f"{exit_code}: {' '.join(text[-3:])}" if text else exit_code
