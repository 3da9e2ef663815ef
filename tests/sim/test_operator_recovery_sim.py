"""Groups fall ill, nodes vanish, operators die and the API server errs: it all ends as if nothing had happened."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Iterator
from random import Random
from typing import Any, Final

import pytest
from tests.support.fault_world import FaultWorld, Illness, shape
from tests.support.kube_fake import Killed, is_ready

from lockstep_operator.types.names import ModelKey
from lockstep_operator.types.recovery_state import Rung

SCHEDULES: Final = int(os.environ.get("LOCKSTEP_SIM_WORLDS", "24"))
FIRST: Final = int(os.environ.get("LOCKSTEP_SIM_FIRST", "0"))  # repeats a schedule of an earlier run
RECOVERY: Final[dict[str, Any]] = {
    "budget": {"attempts": 2, "window": "20m"},
    "backoff": {"initial": "5s", "max": "2m"},
}


async def serving(random: Random | None = None, operators: int = 1, **spec: Any) -> tuple[FaultWorld, ModelKey]:
    world = FaultWorld(random or Random(0), operators)
    key = world.add(**({"recovery": RECOVERY} | spec))
    await world.settle(key)
    assert world.condition(key, "Ready")["status"] == "True"
    return world, key


def uids(world: FaultWorld, key: ModelKey, group: int = 0) -> list[str]:
    return [pod["metadata"]["uid"] for pod in world.sick.pods(key, group)]


async def pass_time(world: FaultWorld, key: ModelKey, seconds: float, step: float = 1.0) -> None:
    """Everything does what it can, once every `step` seconds."""
    end = world.time + seconds
    while world.time < end:
        for operator in range(len(world.operators)):
            await world.look(key, operator)
        for happens in world.kube.steps(world.broken):
            happens()
        world.time += step


def reasons(world: FaultWorld) -> list[str]:
    return [reason for reason, _ in world.events()]


async def test_the_suspects_pod_is_replaced_and_the_others_stay() -> None:
    world, key = await serving()
    before = uids(world, key)
    world.sick.ill[key, 0] = Illness(rank=1, pods=frozenset(before[1:]))
    await pass_time(world, key, 3)
    poisoned = world.condition(key, "Poisoned")
    assert (poisoned["status"], poisoned["reason"]) == ("True", "Hang")
    assert world.condition(key, "Stalled")["status"] == "False", "a recovery is progress"
    assert world.condition(key, "Reconciling")["status"] == "True"
    await pass_time(world, key, 20)
    after = uids(world, key)
    assert (after[0], after[1] != before[1]) == (before[0], True)
    assert world.condition(key, "Ready")["status"] == "True"
    status = world.status(key)
    assert (status["recoveries"], status["lastRecovery"]["rung"], status["lastRecovery"]["suspectRank"]) == (
        1,
        "RecyclePod",
        1,
    )
    assert set(status["lastRecovery"]["phases"]) == {"detect", "recycle"}
    told = [reason for reason in reasons(world) if reason in ("Hang", "RecyclePod", "Recovered")]
    assert sorted(told) == ["Hang", "Recovered", "RecyclePod"]
    await world.recovered(key)


async def test_a_node_that_keeps_failing_is_left_and_used_again_later() -> None:
    world, key = await serving()
    world.sick.ill[key, 0] = Illness(rank=1, node="node-1")
    await pass_time(world, key, 120)
    nodes = {pod["spec"]["nodeName"] for pod in world.sick.pods(key, 0)}
    assert "node-1" not in nodes
    assert world.serving(key) == 1
    assert [plan.rung for plan, _ in world.plans[0]] == [Rung.RECYCLE_POD, Rung.RECYCLE_GROUP, Rung.MOVE_AWAY]
    assert world.status(key)["lastRecovery"]["rung"] == "MoveAway"
    terms = str(world.kube.objects["StatefulSet", "team", "chat-0"]["spec"]["template"]["spec"]["affinity"])
    assert "'NotIn', 'values': ['node-1']" in terms
    await world.recovered(key)
    assert "affinity" not in world.kube.objects["StatefulSet", "team", "chat-0"]["spec"]["template"]["spec"]


async def test_with_no_other_node_the_failing_one_is_given_back() -> None:
    world, key = await serving()
    world.kube.nodes = ["node-0"]
    world.sick.ill[key, 0] = Illness(rank=0, until=world.time + 200)
    await pass_time(world, key, 240)
    assert any("no other node can take the pods, so node-0 is used again" in note for _, note in world.events())
    await world.recovered(key)
    assert world.serving(key) == 1


async def test_a_spent_budget_stalls_the_model_which_is_tried_again_ever_more_seldom() -> None:
    world, key = await serving()
    world.kube.nodes = ["node-0"]
    world.sick.ill[key, 0] = Illness(rank=1, until=world.time + 4000)
    await pass_time(world, key, 900, step=3)
    stalled = world.condition(key, "Stalled")
    assert (stalled["status"], stalled["reason"]) == ("True", "RecoveryExhausted")
    assert "the budget of 2 attempts per rung is spent: the next attempt is at" in stalled["message"]
    tries = [plan.since for plan, memory in world.plans[0] if memory.stalled]
    gaps = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert len(gaps) >= 3
    assert all(gap >= 96 for gap in gaps[2:]), "80 % of the longest wait, and more"
    await world.recovered(key)
    assert world.condition(key, "Stalled")["status"] == "False"
    assert world.status(key)["recoveries"] == 1


async def test_observe_says_what_it_would_do_once_and_touches_nothing() -> None:
    world, key = await serving(recovery=RECOVERY | {"mode": "Observe"})
    before = uids(world, key)
    world.sick.ill[key, 0] = Illness(rank=1, pods=frozenset(before[1:]))
    await pass_time(world, key, 10)
    writes = len(world.kube.writes)
    await pass_time(world, key, 300, step=5)
    assert uids(world, key) == before
    assert world.kube.writes[writes:] == []
    assert reasons(world).count("WouldRecyclePod") == 1
    assert world.condition(key, "Stalled")["status"] == "True", "a person must do it"


async def test_the_plain_strategy_replaces_all_pods() -> None:
    world, key = await serving(recovery=RECOVERY | {"strategy": "RecyclePods"})
    before = uids(world, key)
    world.sick.ill[key, 0] = Illness(rank=1, pods=frozenset(before[1:]))
    await pass_time(world, key, 30)
    assert not {*before} & {*uids(world, key)}
    assert world.status(key)["lastRecovery"]["rung"] == "RecycleGroup"
    await world.recovered(key)


async def test_a_first_pod_that_hangs_is_replaced_after_a_while() -> None:
    world, key = await serving()
    leader, other = uids(world, key)
    world.sick.hanging[leader] = world.time
    await pass_time(world, key, 80, step=4)
    assert uids(world, key)[0] == leader, "its kubelet may still mend it"
    await pass_time(world, key, 60, step=4)
    assert uids(world, key)[0] != leader
    assert uids(world, key)[1] == other
    await world.recovered(key)


async def test_a_vanished_node_is_told_and_its_pods_are_given_up_after_their_grace() -> None:
    world, key = await serving()
    node = world.sick.pods(key, 0)[1]["spec"]["nodeName"]
    gone = uids(world, key)[1]
    world.kube.lost_nodes.add(node)
    world.step()
    await world.look(key)
    assert world.condition(key, "Ready")["reason"] == "NodeLost"
    assert f"node {node} of pod chat-0-1 doesn't respond" in world.condition(key, "Ready")["message"]
    await pass_time(world, key, 100, step=4)
    assert gone in uids(world, key), "within its grace, and a minute more, the node may come back"
    await pass_time(world, key, 120, step=4)
    assert gone not in uids(world, key)
    assert world.serving(key) == 1
    assert ("Pod", "chat-0-1", gone, 0) in world.kube.deleted
    assert "PodLost" in reasons(world)
    assert world.plans.get(0, []) == [], "no budget is spent on it"


async def test_a_first_pod_that_is_deleted_comes_back_without_a_recovery() -> None:
    world, key = await serving()
    world.kube.remove("Pod", "team", "chat-0-0")
    await pass_time(world, key, 30)
    assert world.condition(key, "Ready")["status"] == "True"
    assert world.plans.get(0, []) == []


async def test_what_befell_while_no_operator_was_there_is_told_when_one_is() -> None:
    world, key = await serving()
    before = uids(world, key)
    world.sick.ill[key, 0] = Illness(rank=1, pods=frozenset(before[1:]))
    world.operators = [world.operator()]
    world.time += 500
    await pass_time(world, key, 30)
    assert {"Hang", "RecyclePod", "Recovered"} <= {*reasons(world)}
    assert world.status(key)["lastRecovery"]["phases"]["detect"] >= 0
    assert world.status(key)["recoveries"] == 1


@pytest.mark.parametrize("when", ["before_write", "after_write"])
@pytest.mark.parametrize("illness", ["pod", "node"])
async def test_killed_before_or_after_any_write_the_next_operator_goes_on(when: str, illness: str) -> None:
    """The writes of a whole recovery in turn, until there are no more: of the long one every fourth."""
    for number in itertools.count(0, 4 if illness == "node" else 1):
        world, key = await serving()
        wanted, before = shape(world), uids(world, key)
        sick = Illness(rank=1, pods=frozenset(before[1:])) if illness == "pod" else Illness(rank=1, node="node-1")
        world.sick.ill[key, 0] = sick
        left = itertools.count(number, -1)

        def die(verb: str, kind: str, name: str, left: Iterator[int] = left) -> None:
            if next(left) == 0:
                raise Killed

        setattr(world.kube, when, die)
        await pass_time(world, key, 120 if illness == "node" else 20, step=3 if illness == "node" else 2)
        assert world.serving(key) == 1
        rungs = [plan.rung for plan, _ in world.plans[0]]
        assert rungs == [*Rung][: 3 if illness == "node" else 1], "none twice, and none left out"
        last = next(left)
        await world.recovered(key)
        assert (shape(world), world.status(key)["recoveries"]) == (wanted, 1)
        if last >= 0:
            assert number > 5, "there are more writes than that in a recovery"
            return


def disturb(world: FaultWorld, key: ModelKey) -> None:
    """One of the things that go wrong."""
    random, group = world.random, world.random.randrange(2)
    pods = world.sick.pods(key, group)
    if not pods:
        return
    match random.randrange(7):
        case 0:
            rank = random.randrange(2)
            node_fault_counts = [pod["metadata"]["uid"] for pod in pods if pod["metadata"]["name"].endswith(str(rank))]
            world.sick.ill[key, group] = Illness(rank=rank, pods=frozenset(node_fault_counts))
        case 1:
            everyone = frozenset(pod["metadata"]["uid"] for pod in pods)
            world.sick.ill[key, group] = Illness(rank=random.choice([None, 0, 1]), pods=everyone)
        case 2:
            world.sick.ill[key, group] = Illness(rank=random.randrange(2), node=random.choice(world.kube.nodes))
        case 3:
            until = world.time + random.expovariate(1 / 200)
            world.sick.ill[key, group] = Illness(rank=random.choice([None, 0, 1]), until=until)
        case 4:
            if pods[0]["metadata"]["name"].endswith("-0") and is_ready(pods[0]):
                world.sick.hanging[pods[0]["metadata"]["uid"]] = world.time
        case 5:
            lost = world.kube.lost_nodes
            lost.symmetric_difference_update({random.choice(world.kube.nodes)})
        case _:
            world.kube.remove("Pod", "team", random.choice(pods)["metadata"]["name"])


FAILED: Final = {634}  # a node came back under a pod that could not become Ready, and nobody said so


@pytest.mark.parametrize("seed", sorted({*range(FIRST, FIRST + SCHEDULES)} | FAILED))
async def test_any_schedule_of_faults_ends_as_if_nothing_had_happened(seed: int) -> None:
    random = Random(seed)
    operators = 1 + seed % 2
    world, key = await serving(random, operators, replicas=2)
    wanted = shape(world)
    world.chance = random.choice([0.0, 0.05, 0.2])
    for _ in range(60):
        move = random.random()
        if move < 0.12:
            disturb(world, key)
        elif move < 0.5:
            world.step()
        elif move < 0.6 and operators == 2:
            await asyncio.gather(world.look(key, 0), world.look(key, 1))
        else:
            await world.look(key, random.randrange(operators))
        world.time += random.choice([0.1, 1, 1, 5, 30])
    await world.recovered(key)
    assert world.serving(key) == 2
    assert world.condition(key, "Ready")["status"] == "True"
    assert shape(world) == wanted
    before = len(world.kube.writes)
    world.operators = [world.operator() for _ in world.operators]
    for operator in range(operators):
        await world.look(key, operator)
    assert world.kube.writes[before:] == [], "it stays quiet, even for operators that have just started"
