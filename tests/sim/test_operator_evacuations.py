"""Groups leave cordoned nodes: another one stands in first, and only then their pods go."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from tests.support.kube_evictions import evict, incomplete
from tests.support.kube_fake import is_ready
from tests.support.kube_world import SETTINGS, KilledAtWrite, World

from lockstep_operator.cluster.client import KubeError
from lockstep_operator.decisions.disruption import BUDGET
from lockstep_operator.types.names import ModelKey
from lockstep_operator.types.observed import Object

SIZE = 2


def made(seed: int, operators: int = 1) -> World:
    world = World(operators, Random(seed), replace(SETTINGS, watch_nodes=True))
    world.broken = incomplete(world.kube)
    world.kube.nodes = ["a", "b"]
    return world


async def on_one_node(world: World, replicas: int = 1) -> ModelKey:
    """All of its pods on node a."""
    world.kube.cordoned = {"b"}
    key = world.add(replicas=replicas)
    await world.settle(key)
    world.kube.cordoned = set()
    assert nodes(world) == {"a"}
    return key


def nodes(world: World) -> set[str]:
    return {str(pod["spec"].get("nodeName")) for pod in world.kube.of_kind("Pod")}


def is_evicted(world: World, pod: Object) -> bool:
    try:
        evict(world.kube, "team", pod["metadata"]["name"])
    except KubeError as error:
        if error.status != 429:
            raise
        return False
    return True


def annotate(pod: Object) -> None:
    pod["metadata"].setdefault("annotations", {})["lockstep.dev/evacuate"] = "true"


async def moves(world: World, key: ModelKey, passes: int = 200) -> tuple[int, int]:
    """The fewest groups that served at any moment, and the most that there were, until nothing moves."""
    fewest, most, idle = world.serving(key), 0, 0
    for _ in range(passes):
        before = len(world.kube.writes)
        await world.reconcile(key, world.random.randrange(len(world.operators)))
        possible = world.kube.steps(world.broken)
        if possible:
            world.random.choice(possible)()
        idle = 0 if possible or len(world.kube.writes) > before else idle + 1
        fewest = min(fewest, world.serving(key))
        most = max(most, len(world.kube.of_kind("StatefulSet")))
        if idle > 2:
            return fewest, most
        world.time += 1
    raise AssertionError(f"it still moves: {world.kube.writes[-10:]}")


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("replicas", [1, 2])
async def test_groups_of_a_cordoned_node_move_one_by_one_and_nobody_misses_one(seed: int, replicas: int) -> None:
    world = made(seed, operators=1 + seed % 2)
    key = await on_one_node(world, replicas)
    world.kube.cordoned = {"a"}
    assert await moves(world, key) == (replicas, replicas + 1)
    await world.settle(key)
    assert nodes(world) == {"b"}
    assert {one["metadata"]["name"] for one in world.kube.of_kind("StatefulSet")} == {
        f"chat-{group}" for group in range(replicas)
    }
    assert world.condition(key, "Ready")["status"] == "True"
    assert not [one for one in world.status(key)["conditions"] if one["type"] == "Evacuating"]


@pytest.mark.parametrize("seed", range(4))
async def test_a_pod_that_is_told_to_leave_goes_when_another_group_is_ready(seed: int) -> None:
    world = made(seed)
    key = await on_one_node(world)
    before = {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in world.kube.of_kind("Pod")}
    world.kube.change("Pod", "team", "chat-0-1", annotate)
    assert await moves(world, key) == (1, 2)
    await world.settle(key)
    after = {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in world.kube.of_kind("Pod")}
    assert after.keys() == before.keys()
    assert {name for name in before if before[name] != after[name]} == {"chat-0-1"}, "its other pod keeps its weights"


async def test_an_only_group_can_not_be_evicted_until_it_has_been_moved() -> None:
    world = made(1)
    key = await on_one_node(world)
    world.kube.cordoned = {"a"}
    refusals = 0
    while any(pod["spec"].get("nodeName") == "a" for pod in world.kube.of_kind("Pod")):  # kubectl drain
        for pod in [one for one in world.kube.of_kind("Pod") if one["spec"].get("nodeName") == "a"]:
            if is_ready(pod) and "deletionTimestamp" not in pod["metadata"]:
                refusals += not is_evicted(world, pod)
                assert world.serving(key) >= 1, "an eviction takes only what another stands in for"
        await world.reconcile(key)
        if steps := world.kube.steps(world.broken):
            world.random.choice(steps)()
        world.time += 1
    assert refusals
    await world.settle(key)
    assert world.serving(key) == 1


async def test_where_nobody_can_stand_in_the_status_says_so_and_then_evictions_go_through() -> None:
    world = made(2)
    key = await on_one_node(world)
    world.kube.cordoned = {"a", "b"}
    for _ in range(30):
        await world.reconcile(key)
        for step in world.kube.steps(world.broken):
            step()
        world.time += 5
    condition = world.condition(key, "Evacuating")
    assert (condition["status"], condition["reason"]) == ("True", "Evacuating")
    assert condition["message"] == "group 0: node a of pod chat-0-0 is cordoned; it is moved when group 1 serves"
    assert world.serving(key) == 1, "nothing goes meanwhile"
    with pytest.raises(KubeError):
        evict(world.kube, "team", "chat-0-0")
    world.time += 600
    for _ in range(5):
        await world.reconcile(key)
    condition = world.condition(key, "Evacuating")
    assert (condition["status"], condition["reason"]) == ("True", "NoStandIn")
    assert "group 1 could not stand in within 600 s, so evictions may take one group" in condition["message"]
    evict(world.kube, "team", "chat-0-0")
    world.kube.cordoned = {"a"}
    await world.settle(key)
    assert (world.serving(key), nodes(world)) == (1, {"b"})


async def test_a_cordon_that_is_taken_back_moves_nobody() -> None:
    world = made(3)
    key = await on_one_node(world)
    before = {pod["metadata"]["uid"] for pod in world.kube.of_kind("Pod")}
    world.kube.cordoned = {"a"}
    for _ in range(4):
        await world.reconcile(key)
    assert [one["reason"] for one in world.status(key)["surge"]] == ["Evacuation"]
    world.kube.cordoned = set()
    await world.settle(key)
    assert {pod["metadata"]["uid"] for pod in world.kube.of_kind("Pod")} == before
    assert not world.status(key).get("surge")


async def test_who_tolerates_a_cordon_stays() -> None:
    world = made(4)
    tolerations = [{"key": "node.kubernetes.io/unschedulable", "operator": "Exists"}]
    key = world.add(template={"spec": {"tolerations": tolerations}})
    await world.settle(key)
    world.kube.cordoned = {"a", "b"}
    before = len(world.kube.writes)
    await world.settle(key)
    assert not [one for one in world.kube.writes[before:] if one[1] == "StatefulSet"]


async def test_an_operator_that_is_killed_at_any_write_moves_it_all_the_same() -> None:
    for when in ("before", "after"):
        for number in range(0, 60, 3):
            world = made(number)
            key = await on_one_node(world)
            killed = KilledAtWrite(world.kube, when, number)
            world.kube.cordoned = {"a"}
            assert await moves(world, key) == (1, 2), (when, number)
            assert nodes(world) == {"b"}
            if not killed.happened:
                break  # there are no more writes


async def test_the_budget_of_an_only_group_forbids_what_an_evacuation_does_better() -> None:
    world = made(5)
    key = await on_one_node(world)

    def least() -> int:
        return int(world.kube.objects[BUDGET, "team", "chat"]["spec"]["minAvailable"])

    assert least() == SIZE
    world.edit(key, replicas=2)
    await world.settle(key)
    assert least() == 2 * SIZE - 1
