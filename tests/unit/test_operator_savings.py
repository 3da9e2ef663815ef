"""What healing in place was worth: sums of measured terms that only rise, whichever operator adds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.kube_fake import Killed
from tests.support.kube_world import World, well
from tests.support.operator_models import NOW, group, model, pass_of

from lockstep_operator.groups.group import Group
from lockstep_operator.reporting.document import document, essential
from lockstep_operator.types.model_status import parse
from lockstep_operator.types.names import ModelKey
from lockstep_operator.types.observed import GroupReport, Observed
from lockstep_operator.types.timestamps import format_rfc3339
from lockstep_runtime.protocol.status import Fault, FaultRecord, GroupStatus

KEY = ModelKey("team", "chat")


def fault(number: int, **fields: Any) -> FaultRecord:
    record = FaultRecord(
        id=number, fault=Fault.HANG, rank=1, message="stopped", at=NOW - 30, epoch=number, rung="Respawn",
        recovered_at=NOW - 28, phases={"detect": 1.5, "respawn": 0.25, "firstToken": 0.25}, requests_resumed=3,
    )  # fmt: skip
    return msgspec.structs.replace(record, **fields)


def said(*faults: FaultRecord, **fields: Any) -> GroupStatus:
    counted = {"faults": [*faults], "recoveries": len(faults)}
    return msgspec.structs.replace(well(KEY, 0, "inc", "new"), **(counted | fields))


def started(seconds: float, restarts: int = 0) -> Group:
    """Its pods were Ready so long after they had been made."""
    made = group()
    ready = {"type": "Ready", "status": "True", "lastTransitionTime": format_rfc3339(NOW - 60 + seconds)}
    status = {"conditions": [ready], "containerStatuses": [{"name": "lockstep", "restartCount": restarts}]}
    pods = tuple(replace(pod, raw={"metadata": {}, "spec": {}, "status": status}) for pod in made.pods)
    return replace(made, pods=pods)


def look(old: Mapping[str, Any], report: GroupStatus, seen: Group, now: float = NOW) -> dict[str, Any]:
    reports = {0: GroupReport(status=report)}
    observed = Observed(status=parse(old), resource_version="1", children={}, reports=reports)
    return document(pass_of(model(), observed, seen, now=now).after)


def test_a_start_is_measured_once_and_remembered() -> None:
    first = look({}, said(), started(12))
    assert first["groups"][0]["startSeconds"] == 12.0
    later = look(first, said(fault(1)), started(55))  # it was not Ready for a while
    assert later["groups"][0]["startSeconds"] == 12.0


def test_a_start_after_a_fault_or_of_a_container_that_was_restarted_is_no_measure() -> None:
    assert "startSeconds" not in look({}, said(fault(1)), started(12))["groups"][0]
    assert "startSeconds" not in look({}, said(), started(12, restarts=1))["groups"][0]


def test_another_first_pod_is_another_start() -> None:
    before = look({}, said(), started(12))
    seen = started(20)
    anew = replace(seen, pods=(replace(seen.pods[0], uid="another"), seen.pods[1]))
    assert look(before, said(incarnation="inc2"), anew)["groups"][0]["startSeconds"] == 20.0


def test_each_repair_is_counted_once_with_what_was_measured() -> None:
    before = look({}, said(), started(12))
    assert "savings" not in before
    healed = look(before, said(fault(1), fault(2, requests_resumed=1)), started(12))
    expected = {"faults": 2, "requests": 4, "pausedSeconds": 4.0, "restartSeconds": 24.0, "restartsMeasured": 2}
    assert healed["savings"] == expected
    assert look(healed, said(fault(1), fault(2, requests_resumed=1)), started(12))["savings"] == expected
    assert essential(healed)["savings"] == expected


def test_an_unmeasured_restart_costs_nothing() -> None:
    found = look({}, said(fault(1)), started(12))["savings"]
    assert found == {"faults": 1, "requests": 3, "pausedSeconds": 2.0, "restartSeconds": 0.0, "restartsMeasured": 0}


def test_a_dropped_request_and_a_repair_under_way_save_nothing() -> None:
    open_ = fault(2, recovered_at=None, rung="", phases={})
    assert "savings" not in look({}, said(fault(1, rung="Drop"), open_), started(12))


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2)), max_size=12))
def test_it_never_falls(events: list[tuple[bool, int]]) -> None:
    """Whatever happens: the supervisor starts again, faults come in bunches, the group is away."""
    status: dict[str, Any] = {}
    counts, incarnation, number = (0, 0, 0.0, 0.0), 0, 0
    faults: list[FaultRecord] = []
    for restarted, more in events:
        if restarted:
            incarnation, number, faults = incarnation + 1, 0, []
        for _ in range(more):
            number += 1
            faults.append(fault(number))
        status = look(status, said(*faults, incarnation=f"inc{incarnation}"), started(12))
        saved = status.get("savings") or {}
        now = (
            saved.get("faults", 0), saved.get("requests", 0), saved.get("pausedSeconds", 0.0),
            saved.get("restartSeconds", 0.0),
        )  # fmt: skip
        assert all(new >= old for new, old in zip(now, counts, strict=True))
        counts = now
    assert counts[0] == sum(more for _, more in events)


async def test_operators_that_come_and_go_count_nothing_twice() -> None:
    world = World()
    key = world.add()
    await world.settle(key)
    report = msgspec.structs.replace(well(key, 0, "inc", "rev"), faults=[fault(1, at=world.time)], recoveries=1)
    world.groups.said[key, 0] = GroupReport(status=report)
    await world.settle(key)
    saved = world.status(key)["savings"]
    assert saved["faults"] == 1
    world.operators = [world.operator()]
    await world.settle(key)
    assert world.status(key)["savings"] == saved


@pytest.mark.parametrize("after", [False, True], ids=["before it", "after it"])
@pytest.mark.parametrize("number", range(1, 7))
async def test_an_operator_that_is_killed_at_any_write_leaves_each_repair_counted_once(
    number: int, after: bool
) -> None:
    world = World()
    key = world.add()
    await world.settle(key)
    record = fault(1, at=world.time, fault=Fault.DESYNC)
    report = msgspec.structs.replace(well(key, 0, "inc", "rev"), faults=[record], recoveries=1)
    world.groups.said[key, 0] = GroupReport(status=report)
    left = [number]

    def die(verb: str, kind: str, name: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    if after:
        world.kube.after_write = die
    else:
        world.kube.before_write = die
    await world.settle(key)
    assert world.status(key)["savings"]["faults"] == 1
    assert [one["faults"] for one in world.status(key)["nodeFaults"]] == [1]
    assert [reason for reason, _ in world.events("Node")] == ["Desync"]
