"""Upgrades of the operator leave pods alone; what moves them does so once, and can be undone."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from tests.sim.test_operator_convergence import quiet
from tests.support.kube_fake import revision_of
from tests.support.kube_world import KilledAtWrite, World

from lockstep_operator.types.names import ROLLBACK_ANNOTATION, UPDATE_ANNOTATION, ModelKey
from lockstep_operator.types.timestamps import format_rfc3339


def pods(world: World, key: ModelKey) -> dict[str, str]:
    """Image of the model's pods, by UID."""
    return {
        pod["metadata"]["uid"]: pod["spec"]["containers"][0]["image"]
        for pod in world.kube.of_kind("Pod")
        if pod["metadata"]["labels"]["lockstep.dev/model"] == key.name
    }


def revisions(world: World, key: ModelKey) -> list[str]:
    kept = [one for one in world.kube.of_kind("ControllerRevision") if one["metadata"]["name"].startswith(key.name)]
    return [revision_of(one) for one in sorted(kept, key=lambda one: one["revision"])]


async def served(world: World, *names: str, **spec: Any) -> list[ModelKey]:
    keys = [world.add(name, **spec) for name in names]
    await world.settle(*keys)
    return keys


def ask_for_update(world: World, key: ModelKey) -> None:
    world.annotate(key, UPDATE_ANNOTATION, format_rfc3339(world.time))


async def test_another_runtime_and_another_rendering_restart_no_pod() -> None:
    world = World()
    (key,) = await served(world, "chat", replicas=2)
    before = pods(world, key)
    assert world.status(key)["runtime"] == {"image": "runtime:1", "outdated": False, "updating": False}

    world.upgrade(runtime_image="runtime:2", log_format="json")  # which adds a variable
    await world.settle(key)

    assert pods(world, key) == before
    assert world.status(key)["runtime"] == {"image": "runtime:1", "outdated": True, "updating": False}
    assert world.condition(key, "Ready")["reason"] == "Ready"
    await quiet(world, key)


@pytest.mark.parametrize("kind", ["Pod", "StatefulSet"])
async def test_what_comes_back_after_an_upgrade_is_as_it_was(kind: str) -> None:
    world = World()
    (key,) = await served(world, "chat")
    world.upgrade(runtime_image="runtime:2", log_format="json")
    name = {"Pod": "chat-0-1", "StatefulSet": "chat-0"}[kind]
    world.kube.remove(kind, "team", name)
    await world.settle(key)
    assert set(pods(world, key).values()) == {"runtime:1"}
    assert world.serving(key) == 1


async def test_drift_is_measured_against_what_was_rendered_then() -> None:
    world = World()
    (key,) = await served(world, "chat")
    world.upgrade(runtime_image="runtime:2")
    world.kube.change(
        "StatefulSet", "team", "chat-0",
        lambda live: live["spec"]["template"]["spec"]["containers"][0].update(image="miner:1"),
    )  # fmt: skip
    await world.settle(key)
    template = world.kube.objects["StatefulSet", "team", "chat-0"]["spec"]["template"]
    assert template["spec"]["containers"][0]["image"] == "runtime:1"


async def test_a_group_more_is_like_the_others() -> None:
    world = World()
    (key,) = await served(world, "chat")
    world.upgrade(runtime_image="runtime:2")
    world.edit(key, replicas=2)
    await world.settle(key)
    assert list(pods(world, key).values()) == ["runtime:1"] * 4


async def test_a_change_of_the_spec_takes_the_runtime_along() -> None:
    world = World()
    (key,) = await served(world, "chat")
    world.upgrade(runtime_image="runtime:2")
    world.edit(key, dtype="float32")
    await world.settle(key)
    assert set(pods(world, key).values()) == {"runtime:2"}
    assert world.status(key)["runtime"]["outdated"] is False


async def test_the_annotation_updates_one_model_and_once() -> None:
    world = World()
    chat, code = await served(world, "chat", "code")
    world.upgrade(runtime_image="runtime:2")
    ask_for_update(world, chat)
    await world.settle(chat, code)
    assert set(pods(world, chat).values()) == {"runtime:2"}
    assert set(pods(world, code).values()) == {"runtime:1"}
    updated = pods(world, chat)
    world.upgrade(runtime_image="runtime:3")
    await world.settle(chat, code)
    assert pods(world, chat) == updated, "the request was followed before this upgrade"


async def test_a_request_when_nothing_is_new_is_over_at_once() -> None:
    world = World()
    (key,) = await served(world, "chat")
    before = pods(world, key)
    ask_for_update(world, key)
    await world.settle(key)
    world.upgrade(runtime_image="runtime:2")
    await world.settle(key)
    assert pods(world, key) == before
    await quiet(world, key)


async def test_models_that_update_by_themselves_do_so_in_turn() -> None:
    world = World(random=Random(1))
    keys = await served(world, "chat", "code", "draw", runtime={"update": "Auto"})
    world.upgrade(runtime_image="runtime:2", update_concurrency=1)
    most = 0
    for passes in range(400):
        if passes == 40:  # whoever has the turn keeps it
            world.upgrade()
        for key in keys:
            await world.reconcile(key)
        if steps := world.kube.steps(world.broken):
            world.random.choice(steps)()
        world.time += 1
        most = max(most, sum(world.serving(key) == 0 for key in keys))
    assert most == 1
    await world.settle(*keys)
    assert {image for key in keys for image in pods(world, key).values()} == {"runtime:2"}
    assert not any(world.status(key)["runtime"]["updating"] for key in keys)


async def test_a_runtime_that_does_not_serve_stops_at_the_models_whose_turn_it_is() -> None:
    world = World(random=Random(2))
    keys = await served(world, "chat", "code", "draw", runtime={"update": "Auto"})
    world.broken = lambda pod: pod["spec"]["containers"][0]["image"] == "runtime:2"
    world.upgrade(runtime_image="runtime:2", update_concurrency=1)
    await world.settle(*keys)
    assert sum(world.serving(key) == 0 for key in keys) == 1


async def test_an_operator_that_is_killed_at_any_write_of_an_update_replaces_each_pod_once() -> None:
    for number in range(80):
        world = World(random=Random(number))
        (key,) = await served(world, "chat")
        before, images = pods(world, key), iter(["runtime:3", "runtime:4"])
        world.upgrade(runtime_image="runtime:2")
        ask_for_update(world, key)
        killed = KilledAtWrite(world.kube, "before" if number % 2 else "after", number)
        uids: set[str] = set()
        for _ in range(60):
            alive = not killed.happened
            await world.reconcile(key)
            if alive and killed.happened and "runtime:2" in str(world.kube.of_kind("ControllerRevision")):
                world.upgrade(runtime_image=next(images))  # the next operator is of another version still
            uids |= pods(world, key).keys()
            if steps := world.kube.steps(world.broken):
                world.random.choice(steps)()
            world.time += 1
        await world.settle(key)
        uids |= pods(world, key).keys()
        assert len(uids - before.keys()) == 2, number
        assert len(set(pods(world, key).values())) == 1
        if not killed.happened:
            return
    raise AssertionError("an update of one group has fewer writes than that")


async def test_an_older_revision_comes_back_by_annotation_until_it_is_taken_off() -> None:
    world = World(random=Random(3))
    (key,) = await served(world, "chat", replicas=2)
    (first,) = revisions(world, key)
    world.edit(key, dtype="float32")
    await world.settle(key)
    assert len(revisions(world, key)) == 2

    world.annotate(key, ROLLBACK_ANNOTATION, first)
    await world.settle(key)

    assert {revision_of(pod) for pod in world.kube.of_kind("Pod")} == {first}
    ready = world.condition(key, "Ready")
    assert (ready["status"], ready["reason"]) == ("True", "RolledBack")
    assert world.status(key)["revision"] == first
    await quiet(world, key)
    world.annotate(key, ROLLBACK_ANNOTATION, None)
    await world.settle(key)
    assert {revision_of(pod) for pod in world.kube.of_kind("Pod")}.isdisjoint({first})
    assert "rollback" not in world.status(key)
    await quiet(world, key)


async def test_a_change_of_the_spec_ends_an_undo() -> None:
    world = World(random=Random(3))
    (key,) = await served(world, "chat")
    (first,) = revisions(world, key)
    world.edit(key, dtype="float32")
    await world.settle(key)
    world.annotate(key, ROLLBACK_ANNOTATION, first)
    await world.settle(key)
    world.edit(key, dtype="bfloat16")
    await world.settle(key)
    arguments = [pod["spec"]["containers"][0]["args"] for pod in world.kube.of_kind("Pod")]
    assert all("--dtype=bfloat16" in given for given in arguments)
    assert world.condition(key, "Ready")["reason"] == "Ready"


async def test_a_revision_that_is_not_kept_is_told_with_those_that_are() -> None:
    world = World()
    (key,) = await served(world, "chat")
    (first,) = revisions(world, key)
    world.edit(key, dtype="float32")
    await world.settle(key)
    before = pods(world, key)
    world.annotate(key, ROLLBACK_ANNOTATION, "nonsense")
    await world.settle(key)
    stalled = world.condition(key, "Stalled")
    assert (stalled["status"], stalled["reason"]) == ("True", "InvalidSpec")
    assert "nonsense, which isn't kept" in stalled["message"]
    assert first in stalled["message"]
    assert pods(world, key) == before


async def test_so_many_old_revisions_are_kept_as_the_spec_says() -> None:
    world = World()
    (key,) = await served(world, "chat", revisionHistoryLimit=2)
    for size in range(5):
        world.edit(key, engine={"maxSequences": size + 1})
        await world.settle(key)
    assert len(revisions(world, key)) == 3
    assert revisions(world, key)[-1] == world.status(key)["revision"]


async def test_a_canary_gets_the_change_and_the_groups_below_the_partition_do_not() -> None:
    world = World(random=Random(6))
    (key,) = await served(world, "chat", replicas=3, rollout={"partition": 2})
    (first,) = revisions(world, key)
    world.edit(key, dtype="float32")
    await world.settle(key)

    def by_group() -> dict[str, str]:
        return {pod["metadata"]["labels"]["lockstep.dev/group"]: revision_of(pod) for pod in world.kube.of_kind("Pod")}

    newest = revisions(world, key)[-1]
    assert by_group() == {"0": first, "1": first, "2": newest}
    ready = world.condition(key, "Ready")
    assert (ready["status"], ready["reason"]) == ("True", "Canary")
    assert "2 groups below rollout.partition" in ready["message"]
    assert world.status(key)["updatedReplicas"] == 1
    await quiet(world, key)
    world.kube.remove("StatefulSet", "team", "chat-0")
    await world.settle(key)
    assert by_group()["0"] == first, "made anew, it is as it was"
    world.edit(key, rollout={"partition": 0})
    await world.settle(key)
    assert set(by_group().values()) == {newest}
    assert world.condition(key, "Ready")["reason"] == "Ready"
