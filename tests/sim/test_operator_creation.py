"""What making a model costs the API server. Every event of it asks for a pass, as in a cluster."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from tests.support.kube_watch import KubeWatch
from tests.support.kube_world import KilledAtWrite, World

from lockstep_operator.cluster.namespace_limits import NamespaceLimits
from lockstep_operator.types.names import KIND, ModelKey

OBJECTS = 9  # two Secrets, ServiceAccount, two Services, NetworkPolicy, budget, ControllerRevision, StatefulSet
STATUS_WRITES = 7
EVENTS = 2  # Created, Ready
READS = 1  # the namespace's limits


async def made(world: World, key: ModelKey) -> Counter[tuple[str, str]]:
    """Requests until nothing happens any more, by verb and kind."""
    before = world.kube.requests.copy()
    for _ in range(200):
        while await world.reconcile(key) == 0.0:
            continue
        steps = world.kube.steps(world.broken)
        if not steps:
            return world.kube.requests - before
        steps[0]()
        world.time += 0.3
    raise AssertionError(f"still busy: {world.kube.writes[-10:]}")


async def test_a_model_of_four_ranks_is_made_by_a_write_for_each_object_and_little_else() -> None:
    world = World()
    key = world.add(tensorParallelSize=4)
    requests = await made(world, key)
    assert world.condition(key, "Ready")["status"] == "True"
    writes = Counter(verb for verb, kind, _ in world.kube.writes if kind not in ("Event", KIND))
    assert writes.total() == OBJECTS
    assert requests[("status", KIND)] <= STATUS_WRITES
    assert requests.total() <= OBJECTS + STATUS_WRITES + EVENTS + READS


async def test_more_models_of_a_namespace_cost_no_look_at_its_limits_and_none_at_each_other() -> None:
    world = World()
    await made(world, world.add("first"))
    requests = await made(world, world.add("second"))
    assert requests.total() <= OBJECTS + STATUS_WRITES + EVENTS + READS
    assert [what for what in requests if what[0] in ("get", "find")] == []


async def test_models_that_come_together_ask_once_for_the_limits_of_their_namespace() -> None:
    world = World()
    world.kube.pause = lambda: 3
    limits = NamespaceLimits(world.kube, lambda: world.time)
    await asyncio.gather(*(limits.recent("team", 60) for _ in range(8)))
    assert world.kube.requests[("find", "LimitRange")] == 1
    world.time += 61
    await limits.recent("team", 60)
    assert world.kube.requests[("find", "LimitRange")] == 2


class LateWorld(World):
    """What is watched is heard of only now and then."""

    heard = 0

    def hear(self, watch: KubeWatch) -> None:
        self.heard += 1
        if self.heard % 7 == 1:
            watch.catch_up()


async def test_a_watch_that_is_late_costs_no_write_twice() -> None:
    world = LateWorld()
    key = world.add(tensorParallelSize=4)
    await world.settle(key)
    writes = Counter(what for what in world.kube.writes if what[1] not in ("Event", KIND))
    assert world.condition(key, "Ready")["status"] == "True"
    assert writes.total() == OBJECTS


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", range(OBJECTS + STATUS_WRITES))
async def test_an_operator_killed_at_a_write_makes_nothing_twice(when: str, number: int) -> None:
    world = World()
    killed = KilledAtWrite(world.kube, when, number)
    key = world.add(tensorParallelSize=4)
    await made(world, key)
    await world.settle(key)
    assert world.condition(key, "Ready")["status"] == "True"
    told = Counter(reason for reason, _ in world.events())
    assert told == {"Created": 1, "Ready": 1}
    unread = ("Event", KIND, "Secret")  # what a Secret holds a successor can't see, so it makes the operator's anew
    objects = Counter((verb, kind, name) for verb, kind, name in world.kube.writes if kind not in unread)
    assert len(world.kube.of_kind("Secret")) == 2
    assert killed.happened
    assert all(count == 1 + (when == "before") for count in objects.values() if count > 1)
