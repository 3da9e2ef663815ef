"""The status fits into an object, whatever the model's size and whatever its groups say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from tests.support.kube_world import well
from tests.support.operator_models import NOW, group, model, pass_of, pod

from lockstep_operator.decisions.recovery_policy import RecoveryDecision
from lockstep_operator.groups.group import Group
from lockstep_operator.reporting.document import document
from lockstep_operator.reporting.significance import worth_writing
from lockstep_operator.types.model_status import parse
from lockstep_operator.types.names import ModelKey
from lockstep_operator.types.observed import GroupReport, Observed
from lockstep_operator.types.recovery_state import RecoveryAction, RecoveryState, Rung
from lockstep_runtime.protocol.status import Fault, FaultRecord, GroupState, GroupStatus, Latency, RankState

KEY = ModelKey("team", "llama-405b-instruct")
MOST = 256 * 1024
UID = "123e4567-e89b-12d3-a456-4266141{:05d}"


def of_many(groups: int, size: int) -> tuple[Group, ...]:
    pods = [
        tuple(pod(number, index, name=f"{KEY.name}-{number}-{index}", uid=UID.format(number)) for index in range(size))
        for number in range(groups)
    ]
    return tuple(
        Group(index=number, workload=group(number, size=size).workload, pods=pods[number]) for number in range(groups)
    )


def said(number: int, size: int, *, ill: bool) -> GroupStatus:
    status = well(KEY, number, "0123456789abcdef", "new", size)
    latency = Latency(p50_ms=12.3, p99_ms=23.1)
    state = RankState.ABSENT if ill else RankState.READY
    words = "it was lost with its node and nobody knows when it comes back " * 40 if ill else ""
    ranks = [
        msgspec.structs.replace(rank, step_latency=latency, last_step_at=NOW, state=state, message=words)
        for rank in status.ranks
    ]
    fault = FaultRecord(id=7, fault=Fault.RANK_LOST, rank=1, message=words or "lost", at=NOW, epoch=3)
    return msgspec.structs.replace(
        status, ranks=ranks, step_latency=latency, last_step_at=NOW, faults=[fault], message=words, recoveries=7,
        state=GroupState.POISONED if ill else GroupState.READY,
    )  # fmt: skip


def status_of(groups: int, size: int, ill: int, old: Mapping[str, Any] | None = None) -> dict[str, Any]:
    found = of_many(groups, size)
    reports = {number: GroupReport(status=said(number, size, ill=number < ill)) for number in range(groups)}
    observed = Observed(status=parse(old), resource_version="1", children={}, reports=reports if old is None else {})
    step = RecoveryAction(
        rung=Rung.RECYCLE_GROUP, trigger="0123456789abcdef/7@1800000000", fault="RankLost", rank=1, reason="r" * 900,
        pods=tuple(UID.format(index) for index in range(size)), since=NOW, noticed=NOW, incarnation="0123456789abcdef",
    )  # fmt: skip
    memory = RecoveryState(action=step, attempts_used={Rung.RECYCLE_GROUP: 2}, failures=2, next_try=NOW)
    verdicts = {number: RecoveryDecision(state=memory, reason=step.reason) for number in range(ill)}
    made = model(key=KEY, replicas=groups, tensor_parallel_size=size)
    return document(pass_of(made, observed, *found, recoveries=verdicts).after)


def bytes_of(status: Mapping[str, Any]) -> int:
    return len(json.dumps(status, separators=(",", ":")).encode())


@pytest.mark.parametrize(("groups", "size"), [(1, 256), (10, 8), (100, 8), (125, 64), (1000, 8)])
@pytest.mark.parametrize("ill", [0, 0.02, 0.05])
def test_it_stays_under_256_kib(groups: int, size: int, ill: float) -> None:
    status = status_of(groups, size, round(groups * ill))
    assert bytes_of(status) < MOST
    assert status["ranks"] == f"{(groups - round(groups * ill)) * size}/{groups * size}"
    assert len(status["groups"]) == groups


def test_with_everything_broken_it_is_still_an_object_that_etcd_takes() -> None:
    assert bytes_of(status_of(1000, 8, 1000)) < 1.2 * 1024 * 1024


def test_few_ranks_are_all_listed_and_of_many_those_that_need_a_look() -> None:
    few = status_of(4, 8, 1)
    assert [len(block["ranks"]) for block in few["groups"]] == [8, 8, 8, 8]
    many = status_of(40, 8, 1)
    assert [len(block["ranks"]) for block in many["groups"]] == [8] + [0] * 39
    assert [block["readyRanks"] for block in many["groups"]] == [0] + [8] * 39


def test_an_operator_that_starts_anew_knows_the_ranks_that_were_only_counted() -> None:
    before = status_of(40, 8, 0)
    after = status_of(40, 8, 0, old=before)
    assert after["ranks"] == "320/320"
    assert not worth_writing(before, after)
