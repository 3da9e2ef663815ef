"""Evictions, budgets, and what a person takes out of the operator's hands."""

from __future__ import annotations

from random import Random
from typing import Any

import msgspec
import pytest
from tests.support.kube_evictions import evict, incomplete
from tests.support.kube_fake import is_ready
from tests.support.kube_world import World, well

from lockstep_operator.cluster.client import KubeError
from lockstep_operator.decisions.disruption import BUDGET
from lockstep_operator.types.names import KIND, ModelKey
from lockstep_operator.types.observed import GroupReport, Object
from lockstep_runtime.protocol.status import Fault, FaultRecord, GroupState

LONG = 4000  # seconds: every budget and back-off has passed


@pytest.fixture
def world() -> World:
    made = World(random=Random(7))
    made.broken = incomplete(made.kube)
    return made


def annotate(world: World, key: ModelKey, **annotations: str) -> None:
    named = {f"lockstep.dev/{name.replace('_', '-')}": value for name, value in annotations.items()}
    change = lambda live: live["metadata"].setdefault("annotations", {}).update(named)  # noqa: E731
    world.kube.change(KIND, key.namespace, key.name, change)


def refused(world: World, name: str) -> KubeError:
    with pytest.raises(KubeError) as raised:
        evict(world.kube, "team", name)
    return raised.value


def budget(world: World, name: str, **selector: Any) -> None:
    """Somebody's own."""
    spec = {"maxUnavailable": 1, "selector": selector}
    world.kube.put(BUDGET, {"metadata": {"name": name, "namespace": "team"}, "spec": spec})


def pods(world: World) -> dict[str, Object]:
    return {pod["metadata"]["name"]: pod for pod in world.kube.of_kind("Pod")}


async def test_evictions_take_one_group_at_a_time_and_all_of_it(world: World) -> None:
    key = world.add(replicas=2)
    await world.settle(key)
    evict(world.kube, "team", "chat-0-1")
    assert refused(world, "chat-1-1").status == 429
    assert refused(world, "chat-1-0").status == 429
    for step in world.kube.steps(world.broken):  # the kubelet of its other pod hears that it isn't Ready
        step()
    assert not is_ready(pods(world)["chat-0-0"])
    evict(world.kube, "team", "chat-0-0")
    refusals = 0
    while world.serving(key) < 2:
        assert refused(world, "chat-1-1").status == 429
        refusals += 1
        await world.reconcile(key)
        world.random.choice(world.kube.steps(world.broken))()
        world.time += 1
    assert refusals > 1
    evict(world.kube, "team", "chat-1-1")


async def test_somebody_elses_budget_is_told_and_ours_gives_way_to_it(world: World) -> None:
    key = world.add(replicas=2)
    await world.settle(key)
    assert world.condition(key, "DisruptionsBounded")["status"] == "True"
    budget(world, "theirs", matchExpressions=[{"key": "lockstep.dev/model", "operator": "In", "values": ["chat"]}])
    budget(world, "of-others", matchLabels={"app": "web"})
    assert refused(world, "chat-0-1").status == 500
    await world.settle(key)
    condition = world.condition(key, "DisruptionsBounded")
    assert (condition["status"], condition["reason"]) == ("False", "OtherBudget")
    assert "PodDisruptionBudget theirs selects pods of this model" in condition["message"]
    assert [name for name, _ in world.events()].count("OtherBudget") == 1
    assert world.condition(key, "Ready")["status"] == "True"
    evict(world.kube, "team", "chat-0-1")
    world.kube.remove(BUDGET, "team", "theirs")
    await world.settle(key)
    assert (BUDGET, "team", "chat") in world.kube.objects
    assert world.condition(key, "DisruptionsBounded")["reason"] == "OneGroupAtATime"


async def test_a_budget_that_is_there_before_the_pods_is_respected_from_the_first_pass_on(world: World) -> None:
    budget(world, "everything")
    key = world.add()
    await world.settle(key)
    assert (BUDGET, "team", "chat") not in world.kube.objects
    assert ("apply", BUDGET, "chat") not in world.kube.writes


async def test_a_budget_with_the_models_name_is_left_alone(world: World) -> None:
    budget(world, "chat", matchLabels={"app": "web"})
    key = world.add()
    await world.settle(key)
    assert world.condition(key, "DisruptionsBounded")["reason"] == "OtherBudget"
    assert world.kube.objects[BUDGET, "team", "chat"]["spec"]["selector"] == {"matchLabels": {"app": "web"}}


async def test_without_a_budget_there_is_none(world: World) -> None:
    key = world.add()
    await world.settle(key)
    world.edit(key, disruption={"budget": "None"})
    await world.settle(key)
    assert (BUDGET, "team", "chat") not in world.kube.objects
    assert world.condition(key, "DisruptionsBounded")["reason"] == "NoBudget"
    evict(world.kube, "team", "chat-0-0")
    evict(world.kube, "team", "chat-0-1")


async def test_while_it_is_paused_nothing_is_done_but_reports(world: World) -> None:
    key = world.add(replicas=2)
    await world.settle(key)
    annotate(world, key, paused="true")
    world.kube.remove("Service", "team", "chat-0")
    world.edit(key, engine={"maxSequences": 3})
    poison(world, key, 1)
    before = len(world.kube.writes)
    for _ in range(20):
        await world.reconcile(key)
        world.time += LONG / 20
    done = {verb for verb, kind, _ in world.kube.writes[before:] if kind != "Event"}
    assert done == {"status"}
    assert world.condition(key, "Paused")["reason"] == "Paused"
    assert world.condition(key, "Ready")["reason"] == "Paused"
    assert world.condition(key, "Poisoned")["status"] == "True", "what is so is reported"
    world.groups.said.clear()
    annotate(world, key, paused="false")
    await world.settle(key)
    assert world.condition(key, "Ready")["status"] == "True"
    assert not [one for one in world.status(key)["conditions"] if one["type"] == "Paused"]


async def test_a_fenced_group_is_left_alone_and_takes_no_requests_while_the_others_go_on(world: World) -> None:
    key = world.add(replicas=2)
    await world.settle(key)
    annotate(world, key, fenced_groups="1")
    poison(world, key, 1)
    before = {name: pod["metadata"]["uid"] for name, pod in pods(world).items()}
    world.edit(key, engine={"maxSequences": 3})
    for _ in range(3):
        await world.settle(key)
        world.time += LONG
    after = {name: pod["metadata"]["uid"] for name, pod in pods(world).items()}
    assert {name for name in before if before[name] == after[name]} == {"chat-1-0", "chat-1-1"}
    assert {group: target.fenced for group, target in world.groups.watched[key].items()} == {0: False, 1: True}
    condition = world.condition(key, "Paused")
    assert condition["reason"] == "GroupsFenced"
    assert "groups 1 take no requests" in condition["message"]
    assert world.condition(key, "Ready")["reason"] == "GroupsFenced"
    assert world.condition(key, "Stalled")["status"] == "False"
    world.groups.said.clear()
    annotate(world, key, fenced_groups="")
    await world.settle(key)
    assert world.condition(key, "Ready")["status"] == "True"
    assert {target.fenced for target in world.groups.watched[key].values()} == {False}


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        ({"paused": "yes"}, "must be true or false, and is 'yes'"),
        ({"fenced_groups": "0-2"}, "numbers of groups such as 1,3"),
    ],
)
async def test_an_annotation_that_can_not_be_read_is_told(world: World, annotation: dict[str, str], words: str) -> None:
    key = world.add()
    await world.settle(key)
    annotate(world, key, **annotation)
    await world.settle(key)
    ready = world.condition(key, "Ready")
    assert (ready["status"], ready["reason"]) == ("False", "InvalidSpec")
    assert words in ready["message"]
    assert world.serving(key) == 1


def poison(world: World, key: ModelKey, group: int) -> None:
    pod = pods(world)[f"chat-{group}-0"]
    status = well(key, group, pod["metadata"]["uid"], pod["metadata"]["labels"]["lockstep.dev/revision"])
    fault = FaultRecord(id=1, fault=Fault.HANG, rank=1, message="rank 1 hangs", at=world.time, epoch=1)
    fields = {"state": GroupState.POISONED, "accepting": False, "faults": [fault], "since": world.time}
    poisoned = msgspec.structs.replace(status, **fields)
    world.groups.said[key, group] = GroupReport(status=poisoned)
