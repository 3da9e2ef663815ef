"""Rollouts with groups beyond `replicas`: nobody misses a group, and there is never one too many."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest
from tests.support.kube_fake import is_ready, revision_of
from tests.support.kube_world import KilledAtWrite, World

from lockstep_operator.types.names import ModelKey
from lockstep_operator.types.observed import Object


def groups(world: World) -> set[str]:
    return {name for kind, _, name in world.kube.objects if kind == "StatefulSet"}


def leaders(world: World) -> list[Object]:
    pods = [pod for pod in world.kube.of_kind("Pod") if pod["metadata"]["name"].endswith("-0")]
    return [pod for pod in pods if is_ready(pod) and "deletionTimestamp" not in pod["metadata"]]


async def served(world: World, replicas: int = 1, **rollout: object) -> ModelKey:
    key = world.add(replicas=replicas, rollout=rollout)
    await world.settle(key)
    return key


async def steps(world: World, key: ModelKey, passes: int = 300) -> list[tuple[int, int, int]]:
    """Of each moment: groups that exist, groups that serve, and leaders that are Ready; until nothing moves."""
    seen, idle = [], 0
    for _ in range(passes):
        before = len(world.kube.writes)
        await world.reconcile(key, world.random.randrange(len(world.operators)))
        seen.append((len(groups(world)), world.serving(key), len(leaders(world))))
        possible = world.kube.steps(world.broken)
        idle = 0 if possible or len(world.kube.writes) > before else idle + 1
        if idle > 2:
            break
        if possible:
            world.random.choice(possible)()
            seen.append((len(groups(world)), world.serving(key), len(leaders(world))))
        world.time += 1
    return seen


@pytest.mark.parametrize("seed", range(5))
async def test_a_single_group_is_replaced_while_another_serves(seed: int) -> None:
    world = World(random=Random(seed))
    key = await served(world, maxSurge=1, maxUnavailable=0)
    before = {revision_of(pod) for pod in world.kube.of_kind("Pod")}

    world.edit(key, dtype="float32")
    seen = await steps(world, key)

    assert max(exist for exist, _, _ in seen) == 2
    assert min(serve for _, serve, _ in seen) == 1
    assert min(ready for _, _, ready in seen) >= 1
    await world.settle(key)
    assert groups(world) == {"chat-0"}
    assert {revision_of(pod) for pod in world.kube.of_kind("Pod")}.isdisjoint(before)
    assert world.condition(key, "Ready")["status"] == "True"
    assert "surge" not in world.status(key) or world.status(key)["surge"] == []


def kills(limit: int = 60) -> Iterator[tuple[str, int]]:
    return ((when, number) for number in range(limit) for when in ("before", "after"))


async def test_an_operator_that_is_killed_at_any_write_makes_no_second_surge_group() -> None:
    for when, number in kills():
        world = World(random=Random(number))
        key = await served(world, maxSurge=1, maxUnavailable=0)
        killed = KilledAtWrite(world.kube, when, number)
        world.edit(key, dtype="float32")
        seen = await steps(world, key)
        made = {name for verb, kind, name in world.kube.writes if kind == "StatefulSet"}
        assert made <= {"chat-0", "chat-1"}, (when, number)
        assert min(serve for _, serve, _ in seen) == 1, (when, number)
        assert groups(world) == {"chat-0"}
        if not killed.happened:
            return  # later writes there are none
    raise AssertionError("a rollout of one group has fewer writes than that")


@pytest.mark.parametrize("seed", range(8))
async def test_never_fewer_groups_serve_and_never_more_exist_than_allowed(seed: int) -> None:
    random = Random(seed)
    world = World(operators=1 + seed % 2, random=random)
    replicas, surge, unavailable = random.randint(1, 4), random.randint(1, 3), random.randint(0, 2)
    key = await served(world, replicas, maxSurge=surge, maxUnavailable=unavailable)
    for dtype in ("float32", "float16"):
        world.edit(key, dtype=dtype)
        seen = await steps(world, key, passes=random.choice([5, 20, 300]))
        assert max(exist for exist, _, _ in seen) <= replicas + surge
        assert min(serve for _, serve, _ in seen) >= replicas - unavailable
    await world.settle(key)
    assert len(groups(world)) == replicas == world.serving(key)
    assert world.condition(key, "Ready")["status"] == "True"


async def test_a_broken_change_reaches_nobody_but_the_surge_group_and_mending_it_goes_on() -> None:
    world = World(random=Random(4))
    key = await served(world, 2, maxSurge=1, maxUnavailable=0)
    world.broken = lambda pod: "--dtype=float32" in pod["spec"]["containers"][0]["args"]
    world.edit(key, dtype="float32")
    await world.settle(key)
    assert (groups(world), world.serving(key)) == ({"chat-0", "chat-1", "chat-2"}, 2)
    assert world.status(key)["surge"] == [{"group": 2, "reason": "Rollout"}]
    ready = world.condition(key, "Ready")
    assert (ready["status"], ready["reason"]) == ("False", "RollingOut")
    world.edit(key, dtype="bfloat16")
    await world.settle(key)
    assert (groups(world), world.serving(key)) == ({"chat-0", "chat-1"}, 2)


async def test_taking_a_change_back_takes_the_surge_group_back() -> None:
    world = World(random=Random(4))
    key = await served(world, maxSurge=1, maxUnavailable=0)
    pods = {pod["metadata"]["uid"] for pod in world.kube.of_kind("Pod")}
    world.broken = lambda pod: "--dtype=float32" in pod["spec"]["containers"][0]["args"]
    world.edit(key, dtype="float32")
    await world.settle(key)
    world.edit(key, dtype="auto")
    await world.settle(key)
    assert {pod["metadata"]["uid"] for pod in world.kube.of_kind("Pod")} == pods, "the group that served was left alone"
    assert groups(world) == {"chat-0"}


async def test_a_surge_group_without_a_place_holds_up_no_rollout_that_may_do_without() -> None:
    world = World(random=Random(2))
    key = await served(world, 2, maxSurge=1, maxUnavailable=1)
    full_for("chat-2-", world)
    world.edit(key, dtype="float32")
    await world.settle(key)
    assert (groups(world), world.serving(key)) == ({"chat-0", "chat-1"}, 2)
    assert world.condition(key, "Ready")["status"] == "True"


async def test_without_a_place_for_it_the_group_that_serves_stays_and_one_is_told() -> None:
    world = World(random=Random(2))
    key = await served(world, maxSurge=1, maxUnavailable=0)
    full_for("chat-1-", world)
    world.edit(key, dtype="float32")
    await world.settle(key)
    world.time += 600
    await world.settle(key)
    assert world.serving(key) == 1
    stalled = world.condition(key, "Stalled")
    assert (stalled["status"], stalled["reason"]) == ("True", "ProgressDeadlineExceeded")
    assert "group 0 keeps revision" in stalled["message"]


def full_for(prefix: str, world: World) -> None:
    """The cluster has no room for these pods."""

    def gate(live: Object) -> None:
        if live["kind"] == "StatefulSet" and f"{live['metadata']['name']}-" == prefix:
            term = {"matchFields": [{"key": "metadata.name", "operator": "NotIn", "values": ["node-1"]}]}
            required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}
            live["spec"]["template"]["spec"]["affinity"] = {"nodeAffinity": required}

    world.kube.admit = gate


async def test_scaling_up_meanwhile_makes_a_group_of_the_surge_group() -> None:
    world = World(random=Random(3))
    key = await served(world, maxSurge=1, maxUnavailable=0)
    world.broken = lambda pod: "--dtype=float32" in pod["spec"]["containers"][0]["args"]
    world.edit(key, dtype="float32")
    await world.settle(key)
    surge = world.kube.objects["StatefulSet", "team", "chat-1"]["metadata"]["uid"]
    world.broken = lambda pod: False
    world.edit(key, replicas=2)
    await world.settle(key)
    assert groups(world) == {"chat-0", "chat-1"}
    assert world.kube.objects["StatefulSet", "team", "chat-1"]["metadata"]["uid"] == surge
    assert world.condition(key, "Ready")["status"] == "True"
