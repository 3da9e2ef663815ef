"""What the operator does about groups that can't heal themselves: each decision with its reason."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.support.kube_world import well
from tests.support.operator_models import NOW, group, pod, recovery_of

from lockstep_operator.decisions.fault_detection import HUNG_SECONDS, detect_fault
from lockstep_operator.decisions.recovery_budget import PROVED_SECONDS
from lockstep_operator.decisions.recovery_policy import (
    PATIENCE_SECONDS,
    RecoveryDecision,
    RecoveryInput,
    decide,
)
from lockstep_operator.groups.group import Group
from lockstep_operator.groups.pod_issues import PodIssue
from lockstep_operator.types.names import ModelKey
from lockstep_operator.types.observed import GroupReport, Pod
from lockstep_operator.types.reasons import Reason
from lockstep_operator.types.recovery_state import RecoveryAction, RecoveryState, Rung, to_status
from lockstep_operator.types.spec_blocks import RecoverySpec
from lockstep_operator.types.timestamps import format_rfc3339
from lockstep_runtime.protocol.status import Fault, FaultRecord, GroupState, RankState

KEY = ModelKey("team", "chat")
POLICY = RecoverySpec()


def on_nodes(*nodes: str, **fields: Any) -> Group:
    pods = tuple(placed(index, node, **fields) for index, node in enumerate(nodes))
    return replace(group(size=len(nodes), ready=fields.get("ready", False)), pods=pods)


def placed(index: int, node: str, **fields: Any) -> Pod:
    defaults: dict[str, Any] = {"ready": False, "raw": {"metadata": {}, "spec": {"nodeName": node}, "status": {}}}
    return pod(0, index, **(defaults | fields))


def poisoned(number: int = 1, rank: int | None = 1, *, size: int = 2, **fields: Any) -> GroupReport:
    fault = FaultRecord(id=number, fault=Fault.HANG, rank=rank, message="rank 1 stopped", at=NOW - 3, epoch=1)
    status = well(KEY, 0, "inc", "new", size)
    return GroupReport(status=msgspec.structs.replace(status, state=GroupState.POISONED, faults=[fault], **fields))


def serving() -> GroupReport:
    return GroupReport(status=well(KEY, 0, "inc", "new"))


def decided(
    memory: RecoveryState = RecoveryState(),  # noqa: B008 - frozen
    *,
    of: Group | None = None,
    report: GroupReport | None = None,
    policy: RecoverySpec = POLICY,
    now: float = NOW,
    **fields: Any,
) -> RecoveryDecision:
    found = of or on_nodes("n1", "n2")
    said = poisoned() if report is None else report
    return decide(policy, RecoveryInput(seed="uid/0", group=found, state=memory, report=said, **fields), now)


def rungs(verdict: RecoveryDecision) -> Rung | None:
    return verdict.state.action.rung if verdict.state.action else None


def test_a_group_that_serves_needs_nothing() -> None:
    assert decided(of=group(), report=serving()) == RecoveryDecision(state=RecoveryState())


def test_the_suspects_pod_is_replaced_first() -> None:
    verdict = decided()
    plan = verdict.state.action
    assert plan is not None
    assert (plan.rung, plan.pods, plan.fault, plan.rank) == (Rung.RECYCLE_POD, ("uid-0-1",), "Hang", 1)
    assert verdict.reason == (
        "group 0 can't recover from Hang of rank 1 (rank 1 stopped): "
        "pod chat-0-1 is replaced, the others keep their weights"
    )
    assert verdict.targets == (), "what isn't written yet isn't done"
    assert verdict.requeue_after == 0.0
    assert verdict.state.attempts_used == {Rung.RECYCLE_POD: 1}


def test_what_was_written_is_done_and_done_once() -> None:
    planned = decided().state
    verdict = decided(planned)
    assert [target.uid for target in verdict.targets] == ["uid-0-1"]
    assert verdict.state == planned
    ending = replace(on_nodes("n1", "n2"), pods=(placed(0, "n1"), placed(1, "n2", deleting=NOW + 5)))
    assert decided(planned, of=ending) == RecoveryDecision(state=planned, reason=verdict.reason)


def test_a_pod_of_the_same_name_made_since_is_not_the_one_that_was_meant() -> None:
    planned = decided().state
    assert (
        decided(planned, of=replace(on_nodes("n1", "n2"), pods=(placed(0, "n1"), placed(1, "n2", uid="later")))).targets
        == ()
    )


@pytest.mark.parametrize(
    ("found", "report"),
    [
        (on_nodes("n1", "n2"), poisoned(rank=None)),
        (on_nodes("n1"), poisoned(rank=0, size=1)),
    ],
)
def test_without_a_suspect_or_with_a_single_pod_the_whole_group_is_replaced(found: Group, report: GroupReport) -> None:
    verdict = decided(of=found, report=report)
    assert rungs(verdict) is Rung.RECYCLE_GROUP
    assert verdict.reason.endswith("(rank 1 stopped): all its pods are replaced")
    assert verdict.state.action
    assert verdict.state.action.pods == tuple(pod.uid for pod in found.pods)


def test_the_plain_strategy_replaces_all_pods() -> None:
    assert rungs(decided(policy=RecoverySpec(strategy="RecyclePods"))) is Rung.RECYCLE_GROUP


def test_the_same_fault_is_given_time_while_ranks_load_and_then_patience() -> None:
    planned = decided().state
    anew = replace(on_nodes("n1", "n2"), pods=(placed(0, "n1"), placed(1, "n2", uid="later", created=NOW + 8)))
    loading = poisoned()
    assert loading.status
    ranks = [loading.status.ranks[0], msgspec.structs.replace(loading.status.ranks[1], state=RankState.LOADING)]
    slow = decided(planned, of=anew, report=poisoned(ranks=ranks), now=NOW + 9999)
    assert (rungs(slow), slow.requeue_after) == (Rung.RECYCLE_POD, None)
    waiting = decided(planned, of=anew, now=NOW + 20)
    assert (rungs(waiting), waiting.requeue_after) == (Rung.RECYCLE_POD, PATIENCE_SECONDS - 12)
    assert rungs(decided(planned, of=anew, now=NOW + 8 + PATIENCE_SECONDS)) is Rung.RECYCLE_GROUP


def test_a_new_fault_after_a_repair_means_that_it_failed_and_the_next_rung_waits_its_turn() -> None:
    planned = decided().state
    anew = on_nodes("n1", "n2", created=NOW + 1)
    anew = replace(anew, pods=(anew.pods[0], replace(anew.pods[1], uid="later")))
    early = decided(planned, of=anew, report=poisoned(2), now=NOW + 3)
    assert early.state == planned
    assert planned.next_try is not None
    assert NOW + 8 <= planned.next_try <= NOW + 10
    assert early.reason == (
        f"the last repair failed (Hang: rank 1 stopped): the next attempt is at {format_rfc3339(planned.next_try)}"
    )
    assert early.requeue_after == planned.next_try - (NOW + 3)
    later = decided(planned, of=anew, report=poisoned(2), now=NOW + 11)
    assert rungs(later) is Rung.RECYCLE_GROUP
    assert later.state.attempts_used == {Rung.RECYCLE_POD: 1, Rung.RECYCLE_GROUP: 1}
    assert later.state.failures == 2


def test_the_same_fault_after_another_try_is_a_new_one() -> None:
    planned = decided(report=poisoned(since=NOW - 5)).state
    anew = replace(on_nodes("n1", "n2"), pods=(placed(0, "n1"), placed(1, "n2", uid="later", created=NOW + 1)))
    assert rungs(decided(planned, of=anew, report=poisoned(since=NOW - 5), now=NOW + 20)) is Rung.RECYCLE_POD
    assert rungs(decided(planned, of=anew, report=poisoned(since=NOW + 15), now=NOW + 20)) is Rung.RECYCLE_GROUP


def plan(rung: Rung, **fields: Any) -> RecoveryAction:
    defaults: dict[str, Any] = {
        "rung": rung, "trigger": "inc/1", "fault": "Hang", "rank": 1, "reason": "because", "pods": (),
        "since": NOW - 99, "noticed": NOW - 100, "incarnation": "inc",
    }  # fmt: skip
    return RecoveryAction(**(defaults | fields))


def test_a_node_that_keeps_failing_is_left() -> None:
    memory = RecoveryState(
        action=plan(Rung.RECYCLE_GROUP), attempts_used={Rung.RECYCLE_GROUP: 1}, node_fault_counts={"n2": 1}, failures=1
    )
    verdict = decided(memory, report=poisoned(2))
    assert rungs(verdict) is Rung.MOVE_AWAY
    assert verdict.state.avoided == {"n2": NOW + 3600}
    assert verdict.reason.endswith(
        f"all its pods are replaced and kept away from node n2, which keeps failing, until {format_rfc3339(NOW + 3600)}"
    )
    expired = decided(verdict.state, of=group(), report=serving(), now=NOW + 3600)
    assert expired.state.avoided == {}


def test_where_there_is_no_other_node_the_old_one_is_used_again() -> None:
    memory = RecoveryState(
        action=plan(Rung.MOVE_AWAY, pods=("old",)), attempts_used={Rung.MOVE_AWAY: 1}, avoided={"n1": NOW + 3600}
    )
    pending = on_nodes("", "", phase="Pending", created=NOW - 31)
    trouble = PodIssue(Reason.UNSCHEDULABLE, "pod chat-0-0 is unschedulable")
    verdict = decided(memory, of=pending, report=GroupReport(), issue=trouble)
    assert verdict.reason == "no other node can take the pods, so n1 is used again"
    assert verdict.state.avoided == {}
    assert verdict.state.attempts_used == {Rung.MOVE_AWAY: 3}, "the rung is of no use here"
    assert verdict.state.action
    assert verdict.state.action.pods == ("uid-0-0", "uid-0-1"), "which ask for another node still"
    young = on_nodes("", "", phase="Pending", created=NOW - 5)
    assert decided(memory, of=young, report=GroupReport(), issue=trouble).state.avoided == memory.avoided


def test_when_the_budget_is_spent_it_says_so_and_tries_again_slowly() -> None:
    attempts_used = {Rung.RECYCLE_POD: 3, Rung.RECYCLE_GROUP: 3}
    memory = RecoveryState(action=plan(Rung.RECYCLE_GROUP), attempts_used=attempts_used, failures=6, next_try=NOW + 300)
    stalled = decided(memory, report=poisoned(2))
    assert stalled.state.stalled
    assert stalled.reason == (
        "no step has repaired Hang (rank 1 stopped) and the budget of 3 attempts per rung is spent: "
        f"the next attempt is at {format_rfc3339(NOW + 300)}, later ones come with growing delays"
    )
    late = decided(stalled.state, report=poisoned(2), now=NOW + 300)
    assert late.state.attempts_used == attempts_used, "never overdrawn"
    assert (rungs(late), late.state.stalled, late.state.failures) == (Rung.RECYCLE_GROUP, True, 7)
    assert "a late attempt: all its pods are replaced" in late.reason
    assert late.state.next_try is not None
    assert late.state.next_try >= NOW + 300 + 480


def test_a_repair_that_holds_is_proved_and_budgets_come_back_with_healthy_time() -> None:
    memory = RecoveryState(
        action=plan(Rung.RECYCLE_POD, pods=("x",)), attempts_used={Rung.RECYCLE_POD: 3}, failures=2, next_try=NOW
    )
    begun = decided(memory, of=group(), report=serving()).state
    assert begun.action
    assert (begun.healthy_since, begun.action.healed, begun.action.pods) == (NOW, True, ())
    proved = decided(begun, of=group(), report=serving(), now=NOW + PROVED_SECONDS).state
    assert (proved.action, proved.failures, proved.next_try) == (None, 0, None)
    assert proved.attempts_used == {Rung.RECYCLE_POD: 3}
    fallen = decided(proved, now=NOW + 2 * 1200).state
    assert fallen.attempts_used == {Rung.RECYCLE_POD: 2}, (
        "two thirds of the window gave two back, and one was used at once"
    )
    assert decided(proved, of=group(), report=serving(), now=NOW + 3600).state == RecoveryState()


def test_a_repair_that_does_not_hold_has_failed() -> None:
    memory = RecoveryState(action=plan(Rung.RECYCLE_POD), attempts_used={Rung.RECYCLE_POD: 1}, failures=1)
    begun = decided(memory, of=group(), report=serving()).state
    assert rungs(decided(begun, report=poisoned(2), now=NOW + PROVED_SECONDS - 1)) is Rung.RECYCLE_GROUP
    assert rungs(decided(begun, report=poisoned(2), now=NOW + PROVED_SECONDS)) is Rung.RECYCLE_POD


def test_observe_only_says() -> None:
    policy = RecoverySpec(observe=True)
    verdict = decided(policy=policy)
    assert verdict.reason.endswith(
        "pod chat-0-1 is replaced, the others keep their weights (not done, because recovery.mode is Observe)"
    )
    assert (verdict.state.attempts_used, verdict.state.failures) == ({}, 0)
    requeue_after = decided(verdict.state, policy=policy, now=NOW + 99)
    assert (requeue_after.state, requeue_after.targets, requeue_after.reason) == (verdict.state, (), verdict.reason)
    assert rungs(decided(verdict.state, now=NOW + 99)) is Rung.RECYCLE_POD, "enforced from now on"
    assert decided(decided().state, policy=policy).targets == (), "no longer enforced"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"moving": "group 0 is being replaced by revision x anyway"},
            "group 0 is being replaced by revision x anyway",
        ),
        (
            {"issue": PodIssue(Reason.IMAGE_PULL_FAILED, "pod chat-0-1 can't pull image runtime:1: gone")},
            "pod chat-0-1 can't pull image runtime:1: gone; that comes first, since replacing pods wouldn't fix it",
        ),
        ({"of": replace(on_nodes("n1"), workload=group().workload)}, "waits until its missing pods are recreated"),
        (
            {
                "of": replace(
                    on_nodes("n1", "n2"), pods=(placed(0, "n1", deleting=NOW), placed(1, "n2", phase="Pending"))
                )
            },
            "waits until pod chat-0-0 has ended and pod chat-0-1 runs",
        ),
    ],
)
def test_what_mends_itself_or_needs_a_person_is_waited_for(fields: dict[str, Any], reason: str) -> None:
    verdict = decided(**fields)
    assert (verdict.reason, verdict.state, verdict.targets) == (reason, RecoveryState(), ())


def hanging(started: float, *, ready: bool = False) -> Group:
    state = {"state": {"running": {"startedAt": format_rfc3339(started)}}}
    raw = {"metadata": {}, "spec": {"nodeName": "n1"}, "status": {"containerStatuses": [state]}}
    return replace(on_nodes("n1", "n2"), pods=(pod(0, 0, ready=ready, raw=raw), placed(1, "n2")))


SILENT = GroupReport(unreachable_since=NOW - HUNG_SECONDS, error="timed out")


def test_a_first_pod_that_hangs_is_replaced() -> None:
    verdict = decided(of=hanging(NOW - 500), report=SILENT)
    assert verdict.state.action
    assert (rungs(verdict), verdict.state.action.pods) == (Rung.RECYCLE_POD, ("uid-0-0",))
    assert "pod chat-0-0 runs and has not answered for 90 s: timed out" in verdict.reason


@pytest.mark.parametrize(
    ("found", "report"),
    [
        (hanging(NOW - 500, ready=True), SILENT),  # its kubelet reaches it: the network is at fault
        (hanging(NOW - 10), SILENT),  # just started again by its kubelet
        (hanging(NOW - 500), GroupReport(unreachable_since=NOW - HUNG_SECONDS + 1, error="timed out")),
        (on_nodes("n1", "n2"), SILENT),  # no container runs
        (hanging(NOW - 500), serving()),
        (hanging(NOW - 500), GroupReport()),
        (replace(hanging(NOW - 500), pods=()), SILENT),
    ],
)
def test_a_first_pod_that_may_only_be_out_of_reach_is_left_alone(found: Group, report: GroupReport) -> None:
    assert detect_fault(found, report, NOW) is None


def unready(since: float, started: float = NOW - 500) -> Group:
    found = hanging(started)
    ready = {
        "type": "Ready",
        "status": "False",
        "reason": "ContainersNotReady",
        "lastTransitionTime": format_rfc3339(since),
    }
    leader = found.pods[0]
    raw = {**leader.raw, "status": {**leader.raw["status"], "conditions": [ready]}}
    return replace(found, pods=(replace(leader, raw=raw), found.pods[1]))


def at_rest(last_step: float | None = NOW - 200, **fields: Any) -> GroupReport:
    status = well(KEY, 0, "inc", "new")
    return GroupReport(status=msgspec.structs.replace(status, last_step_at=last_step, **fields))


def test_a_first_pod_whose_engine_hangs_is_replaced() -> None:
    verdict = decided(of=unready(NOW - HUNG_SECONDS), report=at_rest())
    assert rungs(verdict) is Rung.RECYCLE_POD
    assert "pod chat-0-0 runs and accepts no requests and has completed no step for 90 s, though" in verdict.reason


@pytest.mark.parametrize(
    ("found", "report"),
    [
        (unready(NOW - 89), at_rest()),
        (unready(NOW - 200), at_rest(NOW - 80)),  # busy, and slow to say that it is ready
        (unready(NOW - 500), at_rest()),  # never was Ready: it waits for something
        (unready(NOW - 200, started=NOW - 89), at_rest()),
        (unready(NOW - 200), at_rest(state=GroupState.LOADING)),
        (hanging(NOW - 500, ready=True), at_rest()),
    ],
)
def test_a_first_pod_that_is_only_busy_or_not_yet_ready_is_left_alone(found: Group, report: GroupReport) -> None:
    assert detect_fault(found, report, NOW) is None


def test_nothing_is_decided_on_what_nobody_has_heard() -> None:
    silent = decide(POLICY, RecoveryInput(seed="s", group=on_nodes("n1"), state=RecoveryState()), NOW)
    assert silent == RecoveryDecision(state=RecoveryState())
    planned = decided().state
    assert decide(POLICY, RecoveryInput(seed="s", group=group(), state=planned), NOW).targets == (), (
        "it may serve by now"
    )


def test_poisoned_without_a_fault_is_still_poisoned() -> None:
    status = msgspec.structs.replace(
        well(KEY, 0, "inc", "new"), state=GroupState.POISONED, message="no idea", since=1.0
    )
    trigger = detect_fault(group(), GroupReport(status=status), NOW)
    assert trigger is not None
    assert (trigger.key, trigger.fault, trigger.message, trigger.noticed) == ("inc/0@1", "Poisoned", "no idea", 1.0)


counts = st.dictionaries(st.sampled_from(list(Rung)), st.integers(1, 9))
times = st.integers(0, 4_000_000_000).map(float)
nodes = st.text("abc-", min_size=1, max_size=5)
plans = st.builds(
    RecoveryAction,
    rung=st.sampled_from(list(Rung)),
    trigger=st.text(max_size=5),
    fault=st.text(max_size=5),
    rank=st.none() | st.integers(0, 9),
    reason=st.text(max_size=5),
    pods=st.lists(st.text(max_size=5)).map(tuple),
    since=times,
    noticed=times,
    incarnation=st.text(max_size=5),
    dry_run=st.booleans(),
    healed=st.booleans(),
)
memories = st.builds(
    RecoveryState,
    action=st.none() | plans,
    attempts_used=counts,
    failures=st.integers(0, 9),
    next_try=st.none() | times,
    healthy_since=st.none() | times,
    stalled=st.booleans(),
    node_fault_counts=st.dictionaries(nodes, st.integers(1, 9)),
    avoided=st.dictionaries(nodes, times),
)


@given(memories)
def test_memory_survives_the_status(memory: RecoveryState) -> None:
    assert recovery_of(to_status(memory)) == memory


@given(memories, st.integers(-50, 5000), st.booleans(), st.booleans())
@example(
    RecoveryState(attempts_used={Rung.RECYCLE_POD: 1}, healthy_since=NOW + 3600), 0, False, False
)  # by a clock that is ahead
def test_budgets_are_never_overdrawn_and_nothing_unwritten_is_done(
    memory: RecoveryState, later: int, serves: bool, observe: bool
) -> None:
    found, report = (group(), serving()) if serves else (on_nodes("n1", "n2"), poisoned(2))
    policy = RecoverySpec(observe=observe)
    verdict = decided(memory, of=found, report=report, policy=policy, now=NOW + later)
    for rung, count in verdict.state.attempts_used.items():
        assert count <= max(policy.attempts, memory.attempts_used.get(rung, 0))
    written = memory.action.pods if memory.action else ()
    assert all(target.uid in written for target in verdict.targets)
    assert not (observe and verdict.targets)
