"""What calls for a step of recovery (pure): a group that says it is poisoned, or a first pod that hangs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from lockstep_operator.groups import Group
from lockstep_operator.moment import text, unix
from lockstep_operator.observe import Pod, Report
from lockstep_runtime.wire import Fault, FaultRecord, GroupState, GroupStatus

HUNG_SECONDS: Final = 90.0  # the kubelet's liveness probe has had its turn by then


@dataclass(frozen=True, slots=True, kw_only=True)
class Trigger:
    """`key` tells it from every earlier one of the group."""

    key: str
    fault: str
    rank: int | None  # the suspect
    message: str
    noticed: float  # unix seconds
    pod: Pod | None  # the suspect's


def find_trigger(group: Group, report: Report | None, now: float) -> Trigger | None:
    """None as long as the group serves, heals itself, or isn't known."""
    if report is None:
        return None
    if report.unreachable_since is not None:
        return _hung(group, report, now)
    if report.status is not None and report.status.state is GroupState.POISONED:
        return _poisoned(group, report.status, now)
    return _stuck(group, report.status, now) if report.status else None


def _poisoned(group: Group, status: GroupStatus, now: float) -> Trigger:
    newest = max(status.faults, key=lambda fault: fault.id, default=None)
    return Trigger(
        key=f"{fault_key(status, newest)}@{status.since:.0f}",  # the same fault again, once it was tried to heal it
        fault=str(newest.fault) if newest else "Poisoned",
        rank=newest.rank if newest else None,
        message=newest.message if newest else (status.message or "it has not said why"),
        noticed=newest.at if newest else (status.since or now),
        pod=_pod_of(group, status, newest.rank) if newest else None,
    )


def fault_key(status: GroupStatus, fault: FaultRecord | None) -> str:
    return f"{status.incarnation}/{fault.id if fault else 0}"


def answers(trigger: str, status: GroupStatus, fault: FaultRecord) -> bool:
    """Whether a trigger's key is about this fault."""
    return trigger.partition("@")[0] == fault_key(status, fault)


def _pod_of(group: Group, status: GroupStatus, rank: int | None) -> Pod | None:
    index = next((known.pod_index for known in status.ranks if known.rank == rank), None)
    return next((pod for pod in group.pods if pod.index == index), None)


def _hung(group: Group, report: Report, now: float) -> Trigger | None:
    """A first pod that runs and answers neither the operator nor its kubelet. One that its kubelet finds Ready is well:
    then something lies between it and the operator, and replacing pods would not mend that."""
    leader, silent_since = group.leader, report.unreachable_since
    if leader is None or leader.ready or leader.deleting is not None or silent_since is None:
        return None
    words = f"has not answered for {HUNG_SECONDS:g} s: {report.error}"
    return _replaceable(leader, silent_since, words, now)


def _stuck(group: Group, status: GroupStatus, now: float) -> Trigger | None:
    """A first pod whose supervisor answers and says that all is well, but whose engine has not been Ready for long and
    has done no step meanwhile. One that was never Ready waits for something; one that does steps is only busy."""
    leader = group.leader
    if leader is None or leader.ready or leader.deleting is not None or status.state is not GroupState.READY:
        return None
    started, unready_since = _started(leader), _unready_since(leader)
    if started is None or unready_since is None or unready_since <= started:
        return None
    words = f"takes no requests and has done no step for {HUNG_SECONDS:g} s, though its ranks are well"
    return _replaceable(leader, max(unready_since, status.last_step_at or 0.0), words, now)


def _replaceable(leader: Pod, since: float, words: str, now: float) -> Trigger | None:
    started = _started(leader)
    if started is None or now - max(started, since) < HUNG_SECONDS:
        return None
    return Trigger(
        key=f"silent/{leader.uid}/{text(started)}",
        fault=str(Fault.HANG),
        rank=None,
        message=f"pod {leader.name} runs and {words}",
        noticed=since,
        pod=leader,
    )


def _unready_since(pod: Pod) -> float | None:
    """Since when its kubelet has found it not Ready; None when it is Ready or its node isn't heard from."""
    conditions = (pod.raw.get("status") or {}).get("conditions") or []
    ready = next((condition for condition in conditions if condition["type"] == "Ready"), None)
    if ready is None or ready["status"] != "False" or not ready.get("reason") or "lastTransitionTime" not in ready:
        return None
    return unix(ready["lastTransitionTime"])


def _started(pod: Pod) -> float | None:
    """When its containers were last started; None when one doesn't run."""
    containers = (pod.raw.get("status") or {}).get("containerStatuses") or []
    running = [state for container in containers if (state := (container.get("state") or {}).get("running"))]
    if not running or pod.phase != "Running" or len(running) < len(containers):
        return None
    return max(unix(state["startedAt"]) for state in running)
