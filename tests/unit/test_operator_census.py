"""What the watches have missed is found by a few lists for all models."""

from __future__ import annotations

import pytest
from tests.support.kube_watch import KubeWatch
from tests.support.kube_world import World

from lockstep_operator.cluster.census import Census
from lockstep_operator.types.names import ModelKey


async def world_of_two() -> tuple[World, KubeWatch, Census, ModelKey, ModelKey]:
    world = World()
    keys = world.add("chat"), world.add("code", namespace="other")
    await world.settle(*keys)
    watch = KubeWatch(world.kube)
    watch.catch_up()
    return world, watch, Census(world.kube, watch.indexes, ()), *keys


async def test_nothing_is_doubted_when_the_indexes_are_right_and_it_costs_a_list_per_kind() -> None:
    world, _, census, *_ = await world_of_two()
    before = world.kube.requests.total()
    assert await census.take() == set()
    assert world.kube.requests.total() - before == 9


@pytest.mark.parametrize(
    ("kind", "name"), [("Service", "chat"), ("StatefulSet", "chat-0"), ("TensorParallelModel", "chat")]
)
async def test_an_object_whose_end_was_missed_is_found(kind: str, name: str) -> None:
    world, watch, census, chat, _ = await world_of_two()
    world.kube.remove(kind, "team", name)
    watch.catch_up(relisted=True)
    assert await census.take() == {chat}


async def test_a_change_that_was_not_told_a_label_that_is_gone_and_a_model_that_is_new_are_found() -> None:
    world, _, census, chat, code = await world_of_two()
    world.kube.change("Service", "team", "chat", lambda live: live["spec"].update(type="NodePort"))
    assert await census.take() == {chat}
    world.kube.change("Service", "other", "code", lambda live: live["metadata"].update(labels={}))
    new = world.add("new")
    assert await census.take() == {chat, code, new}


async def test_other_limits_of_a_namespace_concern_its_models() -> None:
    world, _, census, chat, _ = await world_of_two()
    assert await census.take() == set()
    world.kube.put("LimitRange", {"metadata": {"name": "small", "namespace": "team"}, "spec": {"limits": []}})
    assert await census.take() == {chat}
    assert await census.take() == set()
    world.kube.remove("LimitRange", "team", "small")
    assert await census.take() == {chat}


async def test_only_namespaces_that_are_served_are_looked_at() -> None:
    world, watch, _, chat, _ = await world_of_two()
    census = Census(world.kube, watch.indexes, ("team",))
    world.kube.change("Service", "team", "chat", lambda live: live["spec"].update(type="NodePort"))
    assert chat in await census.take()
