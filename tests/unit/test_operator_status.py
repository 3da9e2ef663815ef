"""What the status says of what there is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import pytest
from tests.support.kube_world import well
from tests.support.operator_models import NOW, group, model, pass_of, pod

from lockstep_operator.decisions.name_conflicts import NameConflicts
from lockstep_operator.decisions.recovery_policy import RecoveryDecision
from lockstep_operator.groups.group import Group
from lockstep_operator.groups.pod_issues import find_issue, needs_events
from lockstep_operator.reporting.conditions import Obstacle
from lockstep_operator.reporting.document import document, halted
from lockstep_operator.reporting.events import EventDraft, event_drafts, manifest
from lockstep_operator.reporting.significance import worth_writing
from lockstep_operator.reporting.transition import Transition
from lockstep_operator.types.model_status import parse
from lockstep_operator.types.names import ModelKey
from lockstep_operator.types.observed import GroupReport, Observed
from lockstep_operator.types.reasons import EventReason, Reason
from lockstep_operator.types.recovery_state import RecoveryState
from lockstep_operator.types.timestamps import format_rfc3339
from lockstep_runtime.protocol.status import (
    Download,
    Fault,
    FaultRecord,
    GroupState,
    GroupStatus,
    Latency,
    PodProblem,
    PodProblemReason,
    RankState,
)

KEY = ModelKey("team", "chat")


def said(index: int = 0, **fields: Any) -> GroupStatus:
    status = well(KEY, index, "inc", "new")
    return replace_struct(status, **fields)


def replace_struct(status: GroupStatus, **fields: Any) -> GroupStatus:
    return msgspec.structs.replace(status, **fields)


def failed(message: str) -> GroupStatus:
    status = said(state=GroupState.LOADING)
    ranks = [
        msgspec.structs.replace(status.ranks[0]),
        msgspec.structs.replace(status.ranks[1], state=RankState.FAILED, message=message),
    ]
    return replace_struct(status, ranks=ranks)


def seen(*reports: GroupStatus, status: Mapping[str, Any] | None = None, **fields: Any) -> Observed:
    defaults: dict[str, Any] = {
        "status": parse(status), "resource_version": "1", "children": {},
        "reports": {report.group: GroupReport(status=report) for report in reports},
    }  # fmt: skip
    return Observed(**(defaults | fields))


@dataclass(frozen=True)
class Decided:
    groups: tuple[Group, ...]
    fields: dict[str, Any]


def decided(*groups: Group, **fields: Any) -> Decided:
    return Decided(groups, fields)


def change_of(
    decision: Decided, observed: Observed, *, obstacle: Obstacle | None = None, now: float = NOW, **spec: Any
) -> Transition:
    made = model(replicas=len(decision.groups), **spec)
    return pass_of(made, observed, *decision.groups, obstacle=obstacle, now=now, **decision.fields)


def status_of(decision: Decided, observed: Observed, **more: Any) -> dict[str, Any]:
    return document(change_of(decision, observed, **more).after)


def condition(status: Mapping[str, Any], name: str) -> tuple[str, str, str]:
    found = next(item for item in status["conditions"] if item["type"] == name)
    return found["status"], found["reason"], found["message"]


def happened(decision: Decided, observed: Observed) -> list[EventDraft]:
    """To the model."""
    return [draft for draft in event_drafts(change_of(decision, observed)) if draft.pod is None]


def test_a_serving_model() -> None:
    status = status_of(decided(group()), seen(said(step_latency=Latency(p50_ms=12.34, p99_ms=20.0), last_step_at=NOW)))
    assert {item["type"]: item["status"] for item in status["conditions"]} == {
        "Ready": "True", "Available": "True", "ModelLoaded": "True", "CollectivesHealthy": "True",
        "Poisoned": "False", "Reconciling": "False", "Stalled": "False", "DisruptionsBounded": "True",
    }  # fmt: skip
    assert condition(status, "Ready") == ("True", "Ready", "1 group of 2 ranks serve")
    assert (status["ranks"], status["readyReplicas"], status["updatedReplicas"], status["replicas"]) == ("2/2", 1, 1, 1)
    assert status["stepLatency"] == {"p50": "12.3ms", "p99": "20.0ms"}
    rank = status["groups"][0]["ranks"][1]
    assert (rank["pod"], rank["node"], rank["state"], rank["epoch"], rank["respawns"]) == (
        "chat-0-1",
        "node-1",
        "Ready",
        1,
        0,
    )


def test_the_workers_own_words_are_in_model_loaded() -> None:
    status = status_of(decided(group(ready=False)), seen(failed("no config.json in /model")))
    assert condition(status, "ModelLoaded") == (
        "False", "LoadFailed", "group 0: rank 1 can't load the model: no config.json in /model",
    )  # fmt: skip
    assert condition(status, "Stalled")[:2] == ("True", "ModelLoadFailed")
    assert condition(status, "Reconciling")[:2] == ("False", "Stalled")


def test_what_may_pass_by_itself_calls_nobody_before_the_progress_deadline() -> None:
    away = replace_struct(failed("the hub does not answer"), may_pass=True)
    status = status_of(decided(group(ready=False)), seen(away))
    assert condition(status, "Ready")[1] == "ModelLoadFailed"
    assert condition(status, "Stalled")[0] == "False"
    assert condition(status, "Reconciling")[0] == "True"
    trying = replace_struct(said(state=GroupState.LOADING), ranks=[])
    between = status_of(decided(group(ready=False)), seen(trying, status=status))
    assert condition(between, "Stalled")[0] == "False"
    late = status_of(decided(group(ready=False)), seen(away, status=status), now=NOW + 601)
    assert condition(late, "Stalled")[:2] == ("True", "ProgressDeadlineExceeded")
    assert "the hub does not answer" in condition(late, "Stalled")[2]


def test_a_worker_that_tries_again_does_not_hide_why_it_failed() -> None:
    before = status_of(decided(group(ready=False)), seen(failed("no config.json in /model")))
    trying = replace_struct(said(state=GroupState.LOADING), ranks=[])
    after = status_of(decided(group(ready=False)), seen(trying, status=before))
    assert condition(after, "ModelLoaded") == condition(before, "ModelLoaded")
    assert condition(after, "Stalled")[0] == "True"
    changed = status_of(decided(group(ready=False)), seen(trying, status=before), generation=4)
    assert condition(changed, "ModelLoaded")[1] == "Loading", "a new spec begins anew"
    mended = status_of(decided(group()), seen(said(), status=before))
    assert condition(mended, "ModelLoaded")[0] == "True"


@pytest.mark.parametrize(
    ("state", "reason", "words"),
    [
        (GroupState.RECOVERING, "Recovering", "group 0 recovers: rank 1 was lost"),
        (GroupState.POISONED, "Poisoned", "group 0 can't serve and can't recover by itself: rank 1 was lost"),
        (GroupState.DRAINING, "Draining", "group 0 finishes its requests: rank 1 was lost"),
        (GroupState.STARTING, "Starting", "group 0 waits for its 2 ranks: rank 1 was lost"),
    ],
)
def test_ready_says_what_a_group_is_at(state: GroupState, reason: str, words: str) -> None:
    status = status_of(decided(group(ready=False)), seen(said(state=state, message="rank 1 was lost")))
    assert condition(status, "Ready") == ("False", reason, words)
    assert condition(status, "Poisoned")[0] == str(state is GroupState.POISONED)


@pytest.mark.parametrize(
    ("state", "memory", "found"),
    [
        (GroupState.POISONED, RecoveryState(), ("Poisoned", False)),
        (GroupState.POISONED, RecoveryState(stalled=True), ("RecoveryExhausted", True)),
        (GroupState.READY, RecoveryState(), ("Recovering", False)),
        (GroupState.READY, RecoveryState(stalled=True), ("RecoveryExhausted", True)),
    ],
)
def test_what_the_operator_does_is_progress_until_its_budget_is_spent(
    state: GroupState, memory: RecoveryState, found: tuple[str, bool]
) -> None:
    verdict = RecoveryDecision(state=memory, reason="pod chat-0-1 is replaced")
    status = status_of(decided(group(ready=False), recoveries={0: verdict}), seen(said(state=state)))
    assert condition(status, "Ready") == ("False", found[0], "pod chat-0-1 is replaced")
    assert condition(status, "Stalled")[0] == str(found[1])
    assert condition(status, "Reconciling")[0] == str(not found[1])


def test_a_recovery_names_its_fault_and_is_progress_and_no_stall() -> None:
    fault = FaultRecord(id=4, fault=Fault.HANG, rank=1, message="rank 1 stopped", at=NOW, epoch=2)
    status = status_of(
        decided(group(ready=False)), seen(said(state=GroupState.RECOVERING, faults=[fault], recoveries=3))
    )
    assert condition(status, "CollectivesHealthy") == ("False", "Hang", "group 0: rank 1 stopped")
    assert (condition(status, "Reconciling")[0], condition(status, "Stalled")[0]) == ("True", "False")
    assert status["lastFault"] == {
        "fault": "Hang",
        "group": 0,
        "rank": 1,
        "message": "rank 1 stopped",
        "time": format_rfc3339(NOW),
    }
    assert status["groups"][0]["lastFaultID"] == 4


def test_old_pods_that_serve_during_a_rollout_are_available_but_not_ready() -> None:
    status = status_of(
        decided(group(0, "old"), group(1, "new", ready=False)), seen(said(0), said(1, state=GroupState.LOADING))
    )
    assert condition(status, "Ready")[:2] == ("False", "RollingOut")
    assert "group 0 keeps revision old until group 1 is Ready" in condition(status, "Ready")[2]
    assert condition(status, "Available") == ("True", "Serving", "1 of 2 groups accept requests")
    assert (status["readyReplicas"], status["updatedReplicas"]) == (1, 0)


def test_a_refused_write_and_a_conflict_stall_the_model() -> None:
    obstacle = Obstacle(Reason.REFUSED, "the API server refuses a change (x): Forbidden: no", stalled=True)
    refused = status_of(decided(group()), seen(said()), obstacle=obstacle)
    assert condition(refused, "Stalled") == ("True", "Refused", "the API server refuses a change (x): Forbidden: no")
    retrying = status_of(decided(group()), seen(said()), obstacle=Obstacle(Reason.RETRYING, "later", stalled=False))
    assert (condition(retrying, "Reconciling"), condition(retrying, "Stalled")[0]) == (
        ("True", "Retrying", "later"),
        "False",
    )
    conflict = status_of(decided(group(), conflicts=NameConflicts(sentence="Service chat exists")), seen(said()))
    assert condition(conflict, "Ready") == ("False", "NameConflict", "Service chat exists")


def test_a_restarted_operator_trusts_the_last_words_while_the_pod_is_the_same() -> None:
    before = status_of(decided(group()), seen(said(step_latency=Latency(p50_ms=1.0, p99_ms=2.0), last_step_at=NOW)))
    silent = seen(status=before)
    after = status_of(decided(group()), silent, now=NOW + 500)
    assert not worth_writing(before, after)
    other = replace(group(), pods=tuple(pod(0, index, uid=f"other-{index}") for index in range(2)))
    assert condition(status_of(decided(other), silent), "ModelLoaded")[0] == "False"


@pytest.mark.parametrize("state", [state for state in GroupState if state is not GroupState.READY])
def test_last_words_that_are_read_back_stay_as_they_were(state: GroupState) -> None:
    groups = decided(group(ready=False))
    heard = status_of(groups, seen(said(state=state, message="asked to end")))
    remembered = status_of(groups, seen(status=heard))
    requeue_after = status_of(groups, seen(status=remembered))
    assert requeue_after == remembered
    assert condition(requeue_after, "Ready")[2].count("asked to end") <= 1


def test_a_group_that_does_not_answer_for_long_is_unknown() -> None:
    report = GroupReport(status=said(), unreachable_since=NOW - 31, error="connection refused")
    status = status_of(decided(group()), seen(reports={0: report}))
    assert condition(status, "CollectivesHealthy") == (
        "Unknown", "Unreachable", "pod chat-0-0 doesn't answer the operator: connection refused",
    )  # fmt: skip
    assert status["groups"][0]["state"] == "Unknown"
    brief = seen(reports={0: replace(report, unreachable_since=NOW - 5)})
    assert condition(status_of(decided(group()), brief), "CollectivesHealthy")[0] == "True"


def test_a_group_that_recovers_is_not_ready_though_its_pods_still_look_it() -> None:
    status = status_of(decided(group()), seen(said(state=GroupState.RECOVERING, message="rank 1 was lost")))
    assert condition(status, "Ready") == ("False", "Recovering", "group 0 recovers: rank 1 was lost")
    assert condition(status, "Available")[0] == "True", "the Service still sends it requests, which wait"


def test_what_a_deleted_model_left_is_waited_for_and_no_stall() -> None:
    status = status_of(
        decided(group(), conflicts=NameConflicts(sentence="Service chat is still there", ends=True)), seen()
    )
    assert (condition(status, "Reconciling")[0], condition(status, "Stalled")[0]) == ("True", "False")
    waiting = replace(group(0, "new", pods=""), strays=2)
    assert find_issue(waiting, {"uid-0": "FailedCreate: object is being deleted"}, NOW) is None
    words = condition(status_of(decided(waiting), seen()), "Ready")[2]
    assert words == "group 0 waits until 2 older pods of the same names have ended"


def test_recoveries_are_counted_over_processes_and_groups() -> None:
    first = status_of(decided(group()), seen(said(recoveries=2)))
    assert first["recoveries"] == 2
    requeue_after = status_of(decided(group()), seen(said(recoveries=2), status=first))
    assert requeue_after["recoveries"] == 2
    anew = status_of(decided(group()), seen(said(recoveries=1, incarnation="other"), status=requeue_after))
    assert anew["recoveries"] == 3


def test_measurements_alone_are_not_written_but_for_the_first() -> None:
    def at(milliseconds: float | None, old: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
        report = said(step_latency=Latency(p50_ms=milliseconds), last_step_at=NOW, **fields)
        return status_of(decided(group()), seen(report, status=old))

    unmeasured = at(None, {})
    first = at(1.0, unmeasured)
    assert worth_writing(unmeasured, first)
    assert not worth_writing(first, at(2.0, first))
    assert not worth_writing(first, at(None, first))
    other = at(2.0, first, epoch=2)
    assert worth_writing(first, other)
    assert other["stepLatency"] == {"p50": "2.0ms"}, "with what else has changed, the newest is written"


def test_a_condition_keeps_its_time_until_its_status_changes() -> None:
    first = status_of(decided(group(ready=False)), seen())
    second = status_of(decided(group(ready=False)), seen(said(state=GroupState.LOADING), status=first), now=NOW + 9)
    third = status_of(decided(group()), seen(said(), status=second), now=NOW + 20)
    times = [
        next(item["lastTransitionTime"] for item in s["conditions"] if item["type"] == "Ready")
        for s in (first, second, third)
    ]
    assert times == [format_rfc3339(NOW), format_rfc3339(NOW), format_rfc3339(NOW + 20)]


def test_a_spec_that_can_not_be_understood_keeps_what_was_known() -> None:
    before = status_of(decided(group()), seen(said()))
    after = halted(before, parse(before), 4, Reason.INVALID_SPEC, "ranksPerPod must divide", NOW + 1)
    assert condition(after, "Stalled") == ("True", "InvalidSpec", "ranksPerPod must divide")
    assert condition(after, "Available") == condition(before, "Available")
    assert (after["observedGeneration"], after["ranks"]) == (4, "2/2")


def waiting(reason: str, message: str = "", **more: Any) -> dict[str, Any]:
    container = {
        "name": "lockstep",
        "image": "runtime:1",
        "state": {"waiting": {"reason": reason, "message": message}},
        **more,
    }
    return {"metadata": {}, "spec": {"nodeName": "n1"}, "status": {"containerStatuses": [container]}}


ENDED: dict[str, Any] = {"lastState": {"terminated": {"reason": "OOMKilled", "exitCode": 137, "message": "a\nb\nc\nd"}}}
UNPLACED = {
    "type": "PodScheduled",
    "status": "False",
    "message": "0/1 nodes are available: 1 Insufficient nvidia.com/gpu.",
}


@pytest.mark.parametrize(
    ("fields", "reason", "words"),
    [
        (
            {"raw": waiting("ImagePullBackOff", "not found")},
            "ImagePullFailed",
            "pod chat-0-0 can't pull image runtime:1: not found",
        ),
        (
            {"raw": waiting("CreateContainerConfigError", 'secret "hub" not found')},
            "ContainerRefused",
            'secret "hub" not found',
        ),
        ({"raw": waiting("CrashLoopBackOff", **ENDED)}, "CrashLoop", "keeps exiting: OOMKilled, exit code 137: b c d"),
        (
            {"raw": {"metadata": {}, "status": {"conditions": [UNPLACED]}}},
            "Unschedulable",
            "is unschedulable: 0/1 nodes",
        ),
        (
            {"phase": "Failed", "raw": {"metadata": {}, "status": {"reason": "Evicted", "message": "low on memory"}}},
            "PodFailed",
            "has failed: Evicted low on memory",
        ),
        (
            {"deleting": NOW - 40, "raw": {"metadata": {}, "spec": {"nodeName": "n1"}}},
            "PodStuck",
            "within its grace period: is node n1 alive?",
        ),
        (
            {"phase": "Pending", "warning": "FailedMount: no such claim"},
            "MountFailed",
            "can't start: FailedMount: no such claim",
        ),
    ],
)
def test_what_keeps_pods_from_running(fields: dict[str, Any], reason: str, words: str) -> None:
    warning = fields.pop("warning", "")
    troubled = replace(group(ready=False), pods=(pod(ready=False, **fields), pod(0, 1, ready=False)))
    found = find_issue(troubled, {"uid-0-0": warning} if warning else {}, NOW)
    assert found is not None
    assert found.reason == reason
    assert words in found.message
    warnings = {"uid-0-0": warning} if warning else {}
    status = status_of(decided(troubled), seen(warnings=warnings))
    assert condition(status, "Reconciling")[:2] == ("True", reason), "it may pass by itself"
    assert condition(status, "Stalled")[0] == "False"
    almost = status_of(decided(troubled), seen(warnings=warnings, status=status), now=NOW + 599)
    assert condition(almost, "Stalled")[0] == "False"
    late = status_of(decided(troubled), seen(warnings=warnings, status=almost), now=NOW + 600)
    assert condition(late, "Stalled")[:2] == ("True", "ProgressDeadlineExceeded")
    assert words in condition(late, "Stalled")[2], "with the words of what it waits for"
    assert f"nothing has moved since {format_rfc3339(NOW)} ({reason})" in condition(late, "Stalled")[2]


def test_pods_that_can_not_be_created_are_asked_about_and_explained() -> None:
    lacking = group(0, "new", pods="")
    assert needs_events([lacking], NOW) == ["uid-0"]
    found = find_issue(lacking, {"uid-0": "FailedCreate: exceeded quota"}, NOW)
    assert found is not None
    assert found.message == "pods of group 0 can't be created: FailedCreate: exceeded quota"
    assert needs_events([group()], NOW) == []


def test_events_are_named_by_what_happened_so_that_none_is_told_twice() -> None:
    fault = FaultRecord(id=1, fault=Fault.RANK_LOST, rank=1, message="it was killed", at=NOW, epoch=1)
    observed = seen(said(faults=[fault]))
    status = status_of(decided(group()), observed)
    told = happened(decided(group()), observed)
    assert [(item.reason, item.note) for item in told] == [
        ("Created", "pods and Services are being created"),
        ("Ready", "1 group of 2 ranks serve"),
        ("RankLost", "group 0 rank 1: it was killed"),
    ]
    assert [item.key for item in happened(decided(group()), observed)] == [item.key for item in told]
    assert happened(decided(group()), replace(observed, status=parse(status))) == []


def test_a_fault_of_a_rank_is_also_an_event_of_its_pod() -> None:
    def told(at: float, **fields: Any) -> list[dict[str, Any]]:
        record = FaultRecord(id=1, fault=Fault.RANK_LOST, message="it was killed", at=at, epoch=1, **fields)
        drafts = event_drafts(change_of(decided(group()), seen(said(faults=[record]))))
        return [manifest(KEY, "u-1", draft, NOW) for draft in drafts if draft.reason == "RankLost"]

    model, pod = told(NOW, rank=1)
    about = {"apiVersion": "v1", "kind": "Pod", "namespace": "team", "name": "chat-0-1", "uid": "uid-0-1"}
    assert (model["involvedObject"]["kind"], pod["involvedObject"]) == ("TensorParallelModel", about)
    assert (pod["message"], pod["type"]) == (model["message"], "Warning")
    assert pod["metadata"]["name"].startswith("chat-0-1.")
    assert len(told(NOW, rank=None)) == 1
    assert len(told(NOW - 90, rank=1)) == 1, "the pod that had it is gone, and another has its name"


def test_where_the_model_is_reached_and_how_much_of_it_serves() -> None:
    both = decided(group(0), group(1, ready=False))
    status = status_of(both, seen(said(0), said(1, state=GroupState.LOADING)))
    assert (status["url"], status["readyGroups"], status["ranks"]) == ("http://chat.team.svc:8000", "1/2", "4/4")
    assert status_of(both, seen(said(0)))["ranks"] == "2/4", "a group that has not begun has no ranks"
    assert status_of(both, seen(said(1)))["ranks"] == "?/4", "one serves, and can't be asked"
    assert status_of(decided(), seen())["readyGroups"] == "0/0"


def test_a_new_revision_is_an_event() -> None:
    before = status_of(decided(group()), seen(said()))
    observed = seen(said(), status=before)
    notes = [item.note for item in happened(decided(group(revision="newer"), revision="newer"), observed)]
    assert notes == ["the spec asks for revision newer instead of new: groups are replaced in turn"]


@pytest.mark.parametrize(
    "words",
    [
        "/models/m/tokenizer.json can't be used: expected value at line 1 column 1",
        "/models/m/chat_template.jinja is not UTF-8: line 2 has the byte 0xE9 (Latin-1, perhaps); save it as UTF-8",
        "/models/m/chat_template.jinja: the chat template is malformed in line 2: unexpected '}'",
        "/models/m/generation_config.json should hold a JSON object",
    ],
)
@pytest.mark.parametrize("ready", [False, True])
def test_what_the_leader_alone_can_not_use_is_told_in_its_words(words: str, ready: bool) -> None:
    """All ranks have joined; the pod's readiness may be a moment old."""
    written = status_of(decided(group(ready=ready)), seen(said(state=GroupState.FAILED, message=words)))
    for name, reason in (("Ready", "ModelLoadFailed"), ("ModelLoaded", "LoadFailed")):
        assert condition(written, name)[:2] == ("False", reason)
        assert words in condition(written, name)[2]
    assert condition(written, "Stalled")[0] == "True"
    mended = status_of(decided(group()), seen(said(), status=written))
    assert [condition(mended, name)[0] for name in ("Ready", "ModelLoaded", "Stalled")] == ["True", "True", "False"]


def test_a_group_that_reads_its_text_files_still_says_so() -> None:
    words = "all 2 ranks are in step; the tokenizer and the chat template are being read"
    written = status_of(decided(group(ready=False)), seen(said(state=GroupState.LOADING, message=words)))
    assert condition(written, "Ready") == ("False", "Loading", words)


@pytest.mark.parametrize(("accepting", "expected"), [(True, "True"), (False, "False"), (None, "True")])
def test_available_goes_by_the_groups_own_word(accepting: bool | None, expected: str) -> None:
    recovers = said(state=GroupState.RECOVERING, accepting=accepting)
    assert condition(status_of(decided(group()), seen(recovers)), "Available")[0] == expected


def test_what_pods_complain_of_is_why_a_group_does_not_come_up() -> None:
    problem = PodProblem(pod_index=1, reason=PodProblemReason.OUT_OF_MEMORY, at=NOW, message="the zygote was killed")
    waits = said(state=GroupState.STARTING, message="waiting for ranks 0, 1 to connect", pod_problems=[problem])
    observed = seen(waits)
    status = status_of(decided(group(ready=False)), observed)
    assert condition(status, "Ready") == (
        "False",
        "OutOfMemory",
        "pod chat-0-1: the zygote was killed; group 0 waits for its 2 ranks: waiting for ranks 0, 1 to connect",
    )
    assert [(item.reason, item.warning) for item in happened(decided(group(ready=False)), observed)][-1] == (
        "OutOfMemory",
        True,
    )
    assert happened(decided(group(ready=False)), replace(observed, status=parse(status))) == []
    serves = status_of(decided(group()), seen(said(pod_problems=[problem])))
    assert condition(serves, "Ready")[0] == "True", "a zygote that is killed takes no service away"


def test_a_deprecated_value_is_an_event_once_for_each_spec() -> None:
    observed = seen(said())
    made = model(backend="gloo")
    change = pass_of(made, observed, group())
    (draft,) = [one for one in event_drafts(change) if one.reason == EventReason.DEPRECATED]
    assert draft.warning
    assert draft.note == "spec.backend: gloo is deprecated: it is called cpu now. Set cpu, or leave the field out."
    later = replace(observed, status=change.after)
    assert EventReason.DEPRECATED not in {one.reason for one in event_drafts(pass_of(made, later, group()))}
    renamed = model(backend="cpu", generation=4)
    assert EventReason.DEPRECATED not in {one.reason for one in event_drafts(pass_of(renamed, later, group()))}


@pytest.mark.parametrize(
    ("download", "words"),
    [
        (Download(done=3, total=16_400_000_000, percent=30, rate=85_400_000.0), "30 % of 16.4 GB at 85.4 MB/s"),
        (Download(done=0, total=6_500_000), "0 % of 6.5 MB"),
    ],
)
def test_a_download_is_told_in_the_condition_until_it_is_over(download: Download, words: str) -> None:
    fetching = replace_struct(said(state=GroupState.LOADING, message="many words"), ranks=[], download=download)
    written = status_of(decided(group(ready=False)), seen(fetching))
    loaded = next(one for one in written["conditions"] if one["type"] == "ModelLoaded")
    assert (loaded["status"], loaded["reason"]) == ("False", "Loading")
    assert loaded["message"] == f"group 0 downloads the model: {words}"
