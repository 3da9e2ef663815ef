"""Groups that recover for ever and pods that keep ending: their pods are replaced, the suspect's first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest
from tests.support.kube_world import well
from tests.support.operator_models import NOW, group, pod

from lockstep_operator.decisions.fault_detection import RECOVERING_SECONDS, RELOADING_SECONDS
from lockstep_operator.decisions.recovery_policy import PATIENCE_SECONDS, RecoveryDecision, RecoveryInput, decide
from lockstep_operator.groups.pod_issues import PodIssue, find_issue
from lockstep_operator.types.names import ModelKey
from lockstep_operator.types.observed import GroupReport
from lockstep_operator.types.reasons import Reason
from lockstep_operator.types.recovery_state import RecoveryState, Rung
from lockstep_operator.types.spec_blocks import RecoverySpec
from lockstep_runtime.protocol.status import Fault, FaultRecord, GroupState, RankState

KEY = ModelKey("team", "chat")
LOST = FaultRecord(id=3, fault=Fault.RANK_LOST, rank=1, message="its connection closed", at=NOW - 130, epoch=1)


def recovering(since: float, rank: RankState = RankState.ABSENT, **fields: Any) -> GroupReport:
    status = well(KEY, 0, "inc", "new")
    ranks = [status.ranks[0], msgspec.structs.replace(status.ranks[1], state=rank)]
    defaults = {"state": GroupState.RECOVERING, "since": since, "ranks": ranks, "faults": [LOST]}
    return GroupReport(status=msgspec.structs.replace(status, **(defaults | fields)))


def decided(
    report: GroupReport,
    now: float = NOW,
    state: RecoveryState = RecoveryState(),  # noqa: B008 - frozen
    **fields: Any,
) -> RecoveryDecision:
    found = fields.pop("of", None) or group(ready=False)
    return decide(RecoverySpec(), RecoveryInput(seed="s", group=found, state=state, report=report, **fields), now)


def rung(verdict: RecoveryDecision) -> tuple[Rung, tuple[str, ...]] | None:
    plan = verdict.state.action
    return (plan.rung, plan.pods) if plan else None


def test_a_group_that_recovers_for_two_minutes_loses_the_absent_ranks_pod() -> None:
    assert rung(decided(recovering(NOW - RECOVERING_SECONDS + 1))) is None
    late = decided(recovering(NOW - RECOVERING_SECONDS))
    assert rung(late) == (Rung.RECYCLE_POD, ("uid-0-1",))
    assert "it has been recovering since" in late.reason


def test_it_does_so_though_every_kubelet_finds_its_pods_ready() -> None:
    """As where the network between two pods is cut."""
    assert rung(decided(recovering(NOW - 200), of=group(ready=True))) == (Rung.RECYCLE_POD, ("uid-0-1",))


@pytest.mark.parametrize("state", [RankState.STARTING, RankState.LOADING])
def test_ranks_that_load_are_given_their_time(state: RankState) -> None:
    assert rung(decided(recovering(NOW - RELOADING_SECONDS + 1, state, faults=[]))) is None
    assert rung(decided(recovering(NOW - RELOADING_SECONDS, state, faults=[]))) == (Rung.RECYCLE_POD, ("uid-0-1",))


def test_without_anybody_to_suspect_all_pods_go() -> None:
    stuck = recovering(NOW - 200, RankState.READY, faults=[])
    assert rung(decided(stuck)) == (Rung.RECYCLE_GROUP, ("uid-0-0", "uid-0-1"))


def test_the_new_pod_is_given_its_time_though_the_group_calls_itself_poisoned_meanwhile() -> None:
    planned = decided(recovering(NOW - 130)).state
    anew = replace(group(ready=False), pods=(pod(ready=False), pod(0, 1, uid="anew", ready=False, created=NOW + 10)))
    still = recovering(NOW - 130)
    poisoned = recovering(NOW + 20, state=GroupState.POISONED)
    for report in (still, poisoned):
        waits = decided(report, NOW + 30, planned, of=anew)
        assert rung(waits) == (Rung.RECYCLE_POD, ("uid-0-1",))
        later = decided(report, NOW + 10 + PATIENCE_SECONDS, planned, of=anew)
        assert rung(later) == (Rung.RECYCLE_GROUP, ("uid-0-0", "anew"))
    other = msgspec.structs.replace(LOST, id=4)
    next_fault = decided(recovering(NOW + 20, state=GroupState.POISONED, faults=[other]), NOW + 60, planned, of=anew)
    assert rung(next_fault) == (Rung.RECYCLE_GROUP, ("uid-0-0", "anew")), "another fault is another step"


def crashing(index: int = 1, **fields: Any) -> dict[str, Any]:
    ended = {"reason": "Error", "exitCode": 2, "message": "lockstep: can't listen on [::]:7401: taken"}
    waiting = {"waiting": {"reason": "CrashLoopBackOff"}}
    container = {"name": "lockstep", "state": waiting, "lastState": {"terminated": ended}}
    raw = {"metadata": {}, "spec": {"nodeName": "n1"}, "status": {"containerStatuses": [container]}}
    well_enough = pod(ready=False).raw
    pods = tuple(pod(0, number, ready=False, raw=raw if number == index else well_enough) for number in range(2))
    found = replace(group(ready=False), pods=pods)
    return {"of": found, "issue": find_issue(found, {}, NOW), **fields}


def test_a_pod_that_keeps_ending_is_replaced_first_and_waited_for_only_then() -> None:
    report = recovering(NOW - 30)
    verdict = decided(report, **crashing())
    assert rung(verdict) == (Rung.RECYCLE_POD, ("uid-0-1",))
    assert (
        "pod chat-0-1 keeps exiting: Error, exit code 2: lockstep: can't listen on [::]:7401: taken" in verdict.reason
    )
    silent = GroupReport(unreachable_since=NOW - 5, error="refused")
    assert rung(decided(silent, **crashing(0))) == (Rung.RECYCLE_POD, ("uid-0-0",))
    attempts_used = RecoveryState(attempts_used=dict.fromkeys(Rung, 3), failures=9, next_try=NOW + 600)
    assert decided(report, state=attempts_used, **crashing()).state.stalled, (
        "and then it is said that it needs a person"
    )


def test_a_pod_that_keeps_ending_is_left_while_something_else_must_come_first() -> None:
    found = crashing()["of"]
    unplaced = {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no"}]}
    first = pod(0, 0, ready=False, phase="Pending", raw={"metadata": {}, "spec": {}, "status": unplaced})
    both = replace(found, pods=(first, found.pods[1]))
    both_ways = [find_issue(both, {}, NOW), find_issue(replace(both, pods=both.pods[::-1]), {}, NOW)]
    assert [one.reason if one else None for one in both_ways] == ["Unschedulable", "Unschedulable"]
    assert rung(decided(recovering(NOW - 30), of=both, issue=both_ways[0])) is None


def test_scheduling_gates_are_named() -> None:
    gated = {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "SchedulingGated"}]}
    raw = {"metadata": {}, "spec": {"schedulingGates": [{"name": "queue.dev/wait"}]}, "status": gated}
    found = replace(group(ready=False), pods=(pod(ready=False, phase="Pending", raw=raw),))
    assert find_issue(found, {}, NOW) == PodIssue(
        Reason.SCHEDULING_GATED,
        "pod chat-0-0 has scheduling gates (queue.dev/wait): whoever set them must remove them",
    )
