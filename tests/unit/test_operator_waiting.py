"""Since when a group waits, what its pods complain of, and whom a rollout waits for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest
from tests.support.kube_world import well
from tests.support.operator_models import NOW, group, pod

from lockstep_operator.decisions.rollout import RolloutStep, plan
from lockstep_operator.groups.group import Group
from lockstep_operator.groups.process_failures import RECENT_SECONDS, REPEAT_SECONDS, newest_failure
from lockstep_operator.groups.waiting import recovering_since, unplaced, waiting_for
from lockstep_operator.types.documents import read, write
from lockstep_operator.types.model_status import ProcessFailure, Waiting
from lockstep_operator.types.names import ModelKey
from lockstep_operator.types.timestamps import format_rfc3339
from lockstep_runtime.protocol.status import PodProblem, PodProblemReason

KEY = ModelKey("team", "chat")
BEFORE = Waiting("Unschedulable", NOW - 300, "new")


def running_since(seconds: float, **fields: Any) -> Group:
    state = {"name": "lockstep", "state": {"running": {"startedAt": format_rfc3339(NOW - seconds)}}}
    raw = {"metadata": {}, "spec": {}, "status": {"containerStatuses": [state]}}
    return replace(group(), pods=tuple(pod(0, index, raw=raw, ready=False, **fields) for index in range(2)))


@pytest.mark.parametrize(
    ("reason", "found", "expected"),
    [
        ("", group(), None),
        ("Unschedulable", group(), BEFORE),
        ("ImagePullFailed", group(), Waiting("ImagePullFailed", NOW, "new")),
        ("Starting", group(pods=""), BEFORE),
        ("Starting", running_since(599), BEFORE),
        ("Starting", running_since(600), Waiting("Starting", NOW, "new")),
        ("Unschedulable", group(revision="newer"), BEFORE),
        ("ImagePullFailed", group(revision="newer"), Waiting("ImagePullFailed", NOW, "newer")),
    ],
)
def test_what_moves_restarts_the_clock(reason: str, found: Group, expected: Waiting | None) -> None:
    assert waiting_for(reason, found, BEFORE, 600.0, NOW) == expected
    assert read(write(BEFORE), Waiting) == BEFORE


@pytest.mark.parametrize("reason", ["Unschedulable", "SchedulingGated", "PodsRefused"])
def test_pods_that_found_their_nodes_have_the_whole_deadline_to_start(reason: str) -> None:
    raw = {"metadata": {}, "spec": {"nodeName": "node-1"}, "status": {}}
    placed = replace(group(), pods=tuple(pod(0, index, raw=raw, ready=False) for index in range(2)))
    before = msgspec.structs.replace(BEFORE, reason=reason)
    assert waiting_for("Starting", placed, before, 600.0, NOW) == Waiting("Starting", NOW, "new")
    assert waiting_for("Starting", replace(placed, pods=placed.pods[:1]), before, 600.0, NOW) == before


def test_a_rollout_does_not_wait_for_a_group_that_never_found_a_place() -> None:
    waiting = Waiting("Unschedulable", NOW - 300, "old")
    assert unplaced(waiting, "new")
    assert not unplaced(waiting, "old"), "a spec that can't be placed stops after the first group"
    assert not unplaced(Waiting("ImagePullFailed", NOW, "old"), "new")
    assert not unplaced(None, "new")
    groups = [group(0, "old"), group(1, "old"), group(2, "new", ready=False)]
    assert [turn.step for turn in plan(groups, "new", 1)] == [RolloutStep.WAIT, RolloutStep.WAIT, RolloutStep.KEEP]
    assert [turn.step for turn in plan(groups, "new", 1, {2})] == [
        RolloutStep.WAIT,
        RolloutStep.REPLACE,
        RolloutStep.KEEP,
    ]


def killed(at: float, *, limit: str | None = "350Mi", last: bool = True) -> Group:
    ended = {"terminated": {"reason": "OOMKilled", "exitCode": 137, "finishedAt": format_rfc3339(at)}}
    status = {"name": "lockstep", **({"lastState": ended} if last else {"state": ended})}
    container = {"name": "lockstep", **({"resources": {"limits": {"memory": limit}}} if limit else {})}
    raw = {"metadata": {}, "spec": {"containers": [container]}, "status": {"containerStatuses": [status]}}
    return replace(group(), pods=(pod(), pod(0, 1, raw=raw)))


def test_an_out_of_memory_kill_is_told_with_its_limit() -> None:
    found = newest_failure(killed(NOW - 5), None, None, NOW)
    assert found == ProcessFailure(
        "OutOfMemory", "pod chat-0-1 was killed for lack of memory; its memory limit is 350Mi", NOW - 5
    )
    assert read(write(found), ProcessFailure) == found
    unlimited = newest_failure(killed(NOW, limit=None, last=False), None, None, NOW)
    assert unlimited
    assert unlimited.message.endswith("it has no memory limit, so its node was short of memory")
    assert newest_failure(killed(NOW - RECENT_SECONDS), None, None, NOW) is None, "it is over"
    assert newest_failure(group(), None, found, NOW) is None


def test_a_zygote_that_is_killed_every_few_seconds_is_told_every_few_minutes() -> None:
    def said(at: float) -> ProcessFailure | None:
        problem = PodProblem(
            pod_index=1,
            reason=PodProblemReason.OUT_OF_MEMORY,
            at=at,
            message="the zygote was killed, 349 of 350 MiB used",
        )
        status = msgspec.structs.replace(well(KEY, 0, "inc", "new"), pod_problems=[problem])
        return newest_failure(group(), status, told, at + 1)

    told: ProcessFailure | None = None
    changes = 0
    for second in range(0, 3600, 4):
        found = said(NOW + second)
        changes += found != told
        told = found
    assert told
    assert told.message == "pod chat-0-1: the zygote was killed, 349 of 350 MiB used"
    assert changes == 3600 / REPEAT_SECONDS


@pytest.mark.parametrize(
    ("waiting", "since"),
    [
        (Waiting("Recovering", NOW, "new"), NOW),
        (Waiting("RecoveryExhausted", NOW, "new"), NOW),  # it still tries, ever more seldom
        (Waiting("Unschedulable", NOW, "new"), None),
        (None, None),
    ],
)
def test_since_when_a_group_has_been_trying_to_serve_again(waiting: Waiting | None, since: float | None) -> None:
    assert recovering_since(waiting) == since
