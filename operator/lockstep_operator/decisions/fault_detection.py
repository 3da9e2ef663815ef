"""Faults that a group can't recover from by itself (pure): by its own report, or by a leader pod that doesn't
respond."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from lockstep_operator.groups.group import Group
from lockstep_operator.groups.group_view import first_rank, newest_fault
from lockstep_operator.groups.pod_issues import termination_message
from lockstep_operator.types.observed import GroupReport, Pod
from lockstep_operator.types.timestamps import format_rfc3339, parse_rfc3339
from lockstep_runtime.protocol.status import Fault, FaultRecord, GroupState, GroupStatus, RankState

RECOVERING_SECONDS: Final = 120.0  # the group's own deadlines have passed by then
RESTARTING_SECONDS: Final = 300.0  # the same, by several tries
RELOADING_SECONDS: Final = 900.0  # the same, while ranks load that have joined
ENDLESS: Final = "@r"  # in the key of a trigger
LOADING: Final = frozenset({RankState.STARTING, RankState.LOADING})
MESSAGE_LIMIT: Final = 400  # of what a pod wrote
HUNG_SECONDS: Final = 90.0  # the kubelet's liveness probe has failed by then


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectedFault:
    """`key` distinguishes it from every earlier fault of the group."""

    key: str
    fault: str
    rank: int | None  # the suspect
    message: str
    noticed: float  # unix seconds
    pod: Pod | None  # the suspect's


def detect_fault(
    group: Group,
    report: GroupReport | None,
    now: float,
    crashing: Pod | None = None,
    recovering_since: float | None = None,
) -> DetectedFault | None:
    """None as long as the group serves, recovers by itself, or has not reported. `crashing` is a pod in a crash loop;
    `recovering_since` is since when the group has been restarting, whatever it reports in between."""
    if report is None:
        return None
    if report.unreachable_since is None and report.status is not None:
        found = _from_report(group, report.status, now)
        found = found or _restarting_too_long(group, report.status, recovering_since, now)
    else:
        found = _hung(group, report, now)
    return found or (_crashing(group, crashing, now) if crashing else None)


def _from_report(group: Group, status: GroupStatus, now: float) -> DetectedFault | None:
    match status.state:
        case GroupState.POISONED:
            return _poisoned(group, status, now)
        case GroupState.RECOVERING:
            return _recovering_too_long(group, status, now)
        case _:
            return _stalled_engine(group, status, now)


def _restarting_too_long(group: Group, status: GroupStatus, since: float | None, now: float) -> DetectedFault | None:
    """A group whose engine exits again and again, so that no single recovery exceeds its limit."""
    if since is None or status.state not in (GroupState.STARTING, GroupState.LOADING, GroupState.RECOVERING):
        return None
    loads = first_rank(status, RankState.LOADING) is not None
    if now - since < (RELOADING_SECONDS if loads else RESTARTING_SECONDS):
        return None
    absent = first_rank(status, RankState.ABSENT)
    return DetectedFault(
        key=f"recovering{ENDLESS}{since:.0f}",
        fault=str(Fault.RANK_LOST),
        rank=absent,
        message=f"it has been restarting since {format_rfc3339(since)}: {status.message or 'it gave no reason'}",
        noticed=since,
        pod=_pod_of(group, status, absent),
    )


def _crashing(group: Group, pod: Pod, now: float) -> DetectedFault | None:
    """A crash-looping pod that keeps its group from serving: its node may be the cause."""
    if group.ready or pod.deleting is not None:
        return None
    return DetectedFault(
        key=f"crash/{pod.uid}",
        fault=str(Fault.RANK_LOST),
        rank=None,
        message=f"pod {pod.name} keeps exiting: {termination_message(pod)}"[:MESSAGE_LIMIT],
        noticed=now,
        pod=pod,
    )


def _recovering_too_long(group: Group, status: GroupStatus, now: float) -> DetectedFault | None:
    """A group that has been recovering for too long. Ranks that load are given more time."""
    newest, absent = newest_fault(status), first_rank(status, RankState.ABSENT)
    loading = first_rank(status, *LOADING)
    busy = absent is None and loading is not None
    if status.since <= 0 or now - status.since < (RELOADING_SECONDS if busy else RECOVERING_SECONDS):
        return None
    suspects = (absent, newest.rank if newest else None, loading)
    suspect = next((rank for rank in suspects if rank is not None), None)
    why = status.message or "it gave no reason"
    return DetectedFault(
        key=f"{fault_key(status, newest)}{ENDLESS}{status.since:.0f}",
        fault=str(newest.fault) if newest else str(Fault.RANK_LOST),
        rank=suspect,
        message=f"it has been recovering since {format_rfc3339(status.since)}: {why}",
        noticed=newest.at if newest else status.since,
        pod=_pod_of(group, status, suspect),
    )


def _poisoned(group: Group, status: GroupStatus, now: float) -> DetectedFault:
    newest = newest_fault(status)
    return DetectedFault(
        key=f"{fault_key(status, newest)}@{status.since:.0f}",  # the same fault again, after a repair was tried
        fault=str(newest.fault) if newest else "Poisoned",
        rank=newest.rank if newest else None,
        message=newest.message if newest else (status.message or "it gave no reason"),
        noticed=newest.at if newest else (status.since or now),
        pod=_pod_of(group, status, newest.rank if newest else None),
    )


def fault_key(status: GroupStatus, fault: FaultRecord | None) -> str:
    return f"{status.incarnation}/{fault.id if fault else 0}"


def matches(trigger: str, status: GroupStatus, fault: FaultRecord) -> bool:
    """Whether a key is of this fault."""
    return trigger.partition("@")[0] == fault_key(status, fault)


def same_fault(planned: str, key: str) -> bool:
    """Whether the planned step still answers this fault: a group that was recovering for too long may have reported
    Poisoned since, by the same fault."""
    return planned == key or (ENDLESS in planned and planned.partition("@")[0] == key.partition("@")[0])


def _pod_of(group: Group, status: GroupStatus, rank: int | None) -> Pod | None:
    index = next((known.pod_index for known in status.ranks if known.rank == rank), None)
    return next((pod for pod in group.pods if pod.index == index), None)


def _hung(group: Group, report: GroupReport, now: float) -> DetectedFault | None:
    """A leader pod that runs and answers neither the operator nor its kubelet: one that refuses the operator answers.
    If its kubelet finds it Ready, the network between it and the operator is at fault, and replacing pods would not fix
    that."""
    leader, silent_since = group.leader, report.unreachable_since
    if leader is None or leader.ready or leader.deleting is not None or silent_since is None or report.refused:
        return None
    text = f"has not answered for {HUNG_SECONDS:g} s: {report.error}"
    return _replaceable(leader, silent_since, text, now)


def _stalled_engine(group: Group, status: GroupStatus, now: float) -> DetectedFault | None:
    """A leader pod whose supervisor reports Ready, but whose engine has not been Ready for long and has completed no
    step meanwhile. One that was never Ready waits for something; one that completes steps is only busy."""
    leader = group.leader
    if leader is None or leader.ready or leader.deleting is not None or status.state is not GroupState.READY:
        return None
    if status.fenced:
        return None
    begun, unready_since = leader.started, _unready_since(leader)
    if begun is None or unready_since is None or unready_since <= begun:
        return None
    text = f"accepts no requests and has completed no step for {HUNG_SECONDS:g} s, though its ranks are healthy"
    since = max(unready_since, status.since, status.last_step_at or 0.0)
    return _replaceable(leader, since, text, now)


def _replaceable(leader: Pod, since: float, text: str, now: float) -> DetectedFault | None:
    begun = leader.started
    if begun is None or now - max(begun, since) < HUNG_SECONDS:
        return None
    return DetectedFault(
        key=f"silent/{leader.uid}/{format_rfc3339(begun)}",
        fault=str(Fault.HANG),
        rank=None,
        message=f"pod {leader.name} runs and {text}",
        noticed=since,
        pod=leader,
    )


def _unready_since(pod: Pod) -> float | None:
    """Since when its kubelet has found it not Ready; None when it is Ready or its node doesn't respond."""
    ready = pod.conditions.get("Ready", {})
    if ready.get("status") != "False" or not ready.get("reason") or "lastTransitionTime" not in ready:
        return None
    return parse_rfc3339(ready["lastTransitionTime"])
