"""What a pass asks the API server: nothing at rest, and everything before it changes or deletes anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import msgspec
import pytest
from tests.support.kube_fake import Killed, revision_of
from tests.support.kube_watch import KubeWatch
from tests.support.kube_world import World, well

from lockstep_operator.cluster.client import KubeError
from lockstep_operator.cluster.observe import RESTING_SECONDS
from lockstep_operator.types.names import KIND, ModelKey
from lockstep_operator.types.observed import GroupReport
from lockstep_runtime.protocol.status import Fault, FaultRecord, GroupState, GroupStatus

ALL_KINDS = {KIND, "StatefulSet", "Service", "ServiceAccount", "NetworkPolicy", "Pod", "LimitRange",
             "PodDisruptionBudget"}  # fmt: skip
Requests = Counter[tuple[str, str]]


async def asked(world: World, *keys: ModelKey) -> Requests:
    """By one pass of each."""
    before = world.kube.requests.copy()
    for key in keys:
        await world.reconcile(key)
    return world.kube.requests - before


async def at_rest(world: World, **spec: Any) -> ModelKey:
    """A model that is Ready, and was looked at since the status was last written."""
    key = world.add(**spec)
    await world.settle(key)
    await world.reconcile(key)
    return key


async def test_what_is_missing_is_made_without_a_look_and_what_is_there_is_not_touched_by_it() -> None:
    """The index lacks a Service of somebody else, who has put no label of ours on it: no watch tells of that."""
    world = World()
    key = await at_rest(world)
    world.kube.remove("Service", "team", "chat-0")
    made = await asked(world, key)
    assert made[("apply", "Service")] == 1
    assert [kind for verb, kind in made if verb in ("get", "find")] == []
    await world.settle(key)
    world.kube.remove("Service", "team", "chat")
    theirs = world.kube.put("Service", {"metadata": {"name": "chat", "namespace": "team"}, "spec": {"ports": []}})
    version = theirs["metadata"]["resourceVersion"]
    await world.settle(key)
    assert world.condition(key, "Stalled")["reason"] == "NameConflict"
    assert world.kube.objects["Service", "team", "chat"]["metadata"]["resourceVersion"] == version


def poisoned(world: World, key: ModelKey) -> GroupStatus:
    pod = world.kube.objects["Pod", "team", "chat-0-0"]
    status = well(key, 0, pod["metadata"]["uid"], revision_of(pod))
    fault = FaultRecord(id=1, fault=Fault.HANG, rank=1, message="it hangs", at=world.time, epoch=1)
    return msgspec.structs.replace(status, state=GroupState.POISONED, faults=[fault], since=world.time, revision=2)


def restart(world: World) -> None:
    world.operators = [world.operator() for _ in world.operators]


async def test_a_pass_at_rest_asks_nothing() -> None:
    world = World()
    key = await at_rest(world, replicas=2)
    assert await asked(world, key) == {}
    world.time += 600
    assert await asked(world, key) == {}


async def test_an_operator_that_has_just_started_asks_for_the_limits_of_a_namespace_and_nothing_else() -> None:
    world = World()
    key = await at_rest(world, replicas=2)
    restart(world)
    assert await asked(world, key) == {("find", "LimitRange"): 1}, "once for a namespace"
    assert await asked(world, key) == {}


async def test_a_change_of_what_a_group_measures_asks_nothing() -> None:
    world = World()
    key = await at_rest(world)
    pod = world.kube.objects["Pod", "team", "chat-0-0"]
    status = well(key, 0, pod["metadata"]["uid"], revision_of(pod))
    measured = msgspec.structs.replace(status, requests_running=7, revision=9)
    world.groups.said[key, 0] = GroupReport(status=measured)
    assert await asked(world, key) == {}


async def test_what_rests_on_an_invalid_spec_asks_nothing() -> None:
    world = World()
    key = world.add(model={})
    for _ in range(3):
        await world.reconcile(key)
    assert world.condition(key, "Stalled")["reason"] == "InvalidSpec"
    assert await asked(world, key) == {}


async def test_a_pass_that_changes_or_deletes_or_plans_has_read_everything_before() -> None:
    world = World()
    key = await at_rest(world, replicas=2)
    reads: list[set[str]] = []

    def note(verb: str, kind: str, name: str) -> None:
        planned = verb == "status" and bool(world.groups.said)
        if planned or verb == "delete" or (verb == "apply" and (kind, "team", name) in world.kube.objects):
            reads.append({kind for _, kind in world.kube.requests})

    world.kube.before_write = note
    disturbances: list[Callable[[], object]] = [
        lambda: world.kube.change("Service", "team", "chat-0", lambda live: live["spec"]["ports"][0].update(port=1)),
        lambda: world.edit(key, dtype="float32"),
        lambda: world.edit(key, replicas=1),
        lambda: world.groups.said.update({(key, 0): GroupReport(status=poisoned(world, key))}),
    ]
    for disturb in disturbances:
        await world.settle(key)
        disturb()
        reads.clear()
        for _ in range(3):
            if not reads:
                world.kube.requests.clear()
                await world.reconcile(key)
        assert reads, "it writes"
        assert [ALL_KINDS - before for before in reads] == [set()] * len(reads)


class WorldOfItsOperator(World):
    """Nobody else changes anything, so there are events only of what the one operator writes."""

    heard = -1

    def hear(self, watch: KubeWatch) -> None:
        if self.heard != len(self.kube.writes):
            self.heard = len(self.kube.writes)
            watch.catch_up()


async def test_two_hundred_models_in_one_namespace_ask_for_nothing() -> None:
    """As the controller has them looked at: a minute after the last time, less up to a fifth."""
    world, count, minutes = WorldOfItsOperator(), 200, 20
    keys = [world.add(f"m{number}", replicas=0) for number in range(count)]
    while await asked(world, *keys):
        world.time += 1
    random, started = Random(3), world.time
    due = [(world.time + random.uniform(0, 60), key) for key in keys]
    requests, passes = Requests(), 0
    while due:
        world.time, key = due.pop(due.index(min(due)))
        requests, passes = requests + await asked(world, key), passes + 1
        after = world.time + 60 * random.uniform(0.8, 1.0)
        if after < started + 60 * minutes:
            due.append((after, key))
    assert passes > count * minutes
    assert requests == {}


# --- what the indexes don't know ---


class DeafWorld(World):
    """Its operators' watches can be silenced, or lose what ends."""

    def __init__(self) -> None:
        self.silent = self.relisted = False
        super().__init__()

    def hear(self, watch: KubeWatch) -> None:
        if not self.silent:
            watch.catch_up(relisted=self.relisted)


@pytest.mark.parametrize("kind", ["StatefulSet", "Service", "ServiceAccount", "NetworkPolicy"])
async def test_a_child_of_which_no_watch_tells_that_it_is_gone_comes_back_all_the_same(kind: str) -> None:
    """kopf's index has it for ever, when the watch was down for so long that everything had to be listed anew."""
    world = DeafWorld()
    key = await at_rest(world)
    name = next(name for found, _, name in world.kube.objects if found == kind)
    world.relisted = True
    world.kube.remove(kind, "team", name)
    await world.reconcile(key)
    assert (kind, "team", name) not in world.kube.objects, "nothing has told of it"
    world.time += RESTING_SECONDS
    await world.settle(key)
    assert (kind, "team", name) in world.kube.objects
    await world.reconcile(key)
    assert await asked(world, key) == {}, "what is known to be gone is no reason to look again"


async def test_pods_that_came_and_went_unheard_are_no_reason_to_look_again() -> None:
    world = DeafWorld()
    key = await at_rest(world)
    world.relisted = True
    world.kube.remove("Pod", "team", "chat-0-1", 0)
    await world.settle(key)
    await world.reconcile(key)
    assert await asked(world, key) == {}
    assert world.status(key)["ranks"] == "2/2"


async def test_an_index_that_lags_behind_leads_to_no_write() -> None:
    """Of what the operator does itself its index never hears here, so the group that it has removed is still in it."""
    world = DeafWorld()
    key = await at_rest(world, replicas=2)
    world.edit(key, replicas=1)
    await world.reconcile(key)
    world.silent = True
    await world.settle(key)
    assert world.serving(key) == 1
    writes = len(world.kube.writes)
    for _ in range(5):
        await world.reconcile(key)
        world.time += 60
    assert world.kube.writes[writes:] == []
    world.silent = False
    await world.reconcile(key)
    assert await asked(world, key) == {}


async def test_a_delete_that_only_the_index_asks_for_is_not_done() -> None:
    """The model was scaled in and out again, and the index has the first of it alone."""
    world = World()
    key = await at_rest(world, replicas=2)
    world.edit(key, replicas=1)
    world.kube.before_read = lambda: world.edit(key, replicas=2)
    await world.reconcile(key)
    assert world.kube.deleted == []
    await world.settle(key)
    assert world.serving(key) == 2


async def test_a_label_taken_off_a_child_is_put_back() -> None:
    world = World()
    key = await at_rest(world)
    world.kube.change("Service", "team", "chat-0", lambda live: live["metadata"]["labels"].clear())
    await world.settle(key)
    assert world.kube.objects["Service", "team", "chat-0"]["metadata"]["labels"]["lockstep.dev/model"] == "chat"
    await world.reconcile(key)
    assert await asked(world, key) == {}


async def test_what_has_a_name_that_the_model_needs_is_looked_at_every_minute_and_not_at_every_pass() -> None:
    world = World()
    world.kube.put("Service", {"metadata": {"name": "chat", "namespace": "team"}, "spec": {"ports": []}})
    key = await at_rest(world)
    assert world.condition(key, "Ready")["reason"] == "NameConflict"
    assert await asked(world, key) == {}
    world.kube.remove("Service", "team", "chat")
    world.time += 60
    await world.settle(key)
    assert world.condition(key, "Ready")["status"] == "True"


async def test_a_read_that_fails_at_rest_is_tried_again_and_writes_nothing() -> None:
    world = World()
    key = await at_rest(world)
    world.time += 1.25 * RESTING_SECONDS  # it reads everything
    writes = len(world.kube.writes)

    def away() -> None:
        raise KubeError(503, "ServiceUnavailable", "later")

    world.kube.before_read = away
    assert (await world.reconcile(key) or 99) <= 0.5
    world.kube.before_read = lambda: None
    assert (await world.reconcile(key) or 0) > 40
    assert world.kube.writes[writes:] == []


@pytest.mark.parametrize("seed", range(6))
async def test_an_operator_killed_anywhere_leaves_its_successor_a_model_that_comes_to_rest(seed: int) -> None:
    world = World(random=Random(seed))
    key = world.add(replicas=2)

    def die(verb: str, kind: str, name: str) -> None:
        if world.random.random() < 0.2:
            raise Killed

    world.kube.before_write = world.kube.after_write = die
    for _ in range(60):
        await world.reconcile(key)
        if steps := world.kube.steps(world.broken):
            world.random.choice(steps)()
        world.time += world.random.random()
    world.kube.before_write = world.kube.after_write = lambda verb, kind, name: None
    world.edit(key, replicas=1)
    await world.settle(key)
    await world.reconcile(key)
    assert await asked(world, key) == {}
    assert world.condition(key, "Ready")["status"] == "True"
