"""A model of a hub is one commit for all pods of all groups, whatever the branch does and whoever ends meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

import msgspec
import pytest
from tests.support.kube_fake import FakeKube, is_ready, revision_of
from tests.support.kube_world import Groups, World

from lockstep_operator.types.names import ModelKey
from lockstep_operator.types.observed import GroupReport, Object

A, B, C = "a" * 40, "b" * 40, "c" * 40
HUB = {"huggingFace": {"repo": "org/model"}}
AT = "2027-01-15T09:00:00Z"


class Resolving(Groups):
    """Every group's first pod loads the commit of its arguments, else what the branch was when it was made."""

    def __init__(self, kube: FakeKube) -> None:
        super().__init__(kube)
        self.branch = A
        self.loaded: dict[str, str] = {}  # by UID
        self.moves: list[str] = []  # what the branch becomes after each resolution

    def commit(self, pod: Object) -> str:
        uid = pod["metadata"]["uid"]
        if uid not in self.loaded:
            revision = flag_of(pod["spec"], "--revision")
            given = commit_of(pod["spec"]) or (revision if len(revision) == 40 else "")
            self.loaded[uid] = given or self.branch
            if not given and self.moves:
                self.branch = self.moves.pop(0)
        return self.loaded[uid]

    def reports(self, key: ModelKey, leaders: Mapping[int, str]) -> dict[int, GroupReport]:
        found = super().reports(key, leaders)
        pods = {pod["metadata"]["uid"]: pod for pod in self._kube.of_kind("Pod")}
        return {
            group: GroupReport(status=msgspec.structs.replace(report.status, commit=self.commit(pods[leaders[group]])))
            for group, report in found.items()
            if report.status is not None
        }


def commit_of(spec: Mapping[str, Any]) -> str:
    return flag_of(spec, "--commit")


def flag_of(spec: Mapping[str, Any], flag: str) -> str:
    flags = [one.partition("=") for one in spec["containers"][0]["args"]]
    return next((value for name, _, value in flags if name == flag), "")


def world_of(groups: int, random: Random | None = None, **spec: Any) -> tuple[World, Resolving, ModelKey]:
    world = World(random=random)
    hub = world.groups = Resolving(world.kube)
    world.operators = [world.operator()]
    return world, hub, world.add(replicas=groups, model=HUB, **spec)


def commits(world: World, hub: Resolving) -> set[str]:
    """That serve."""
    leaders = [pod for pod in world.kube.of_kind("Pod") if is_ready(pod) and pod["metadata"]["name"].endswith("-0")]
    return {hub.commit(pod) for pod in leaders}


def rendered(world: World) -> set[str]:
    return {commit_of(one["spec"]["template"]["spec"]) for one in world.kube.of_kind("StatefulSet")}


def pods(world: World) -> set[str]:
    return {pod["metadata"]["uid"] for pod in world.kube.of_kind("Pod")}


async def test_what_the_first_group_says_is_written_down_and_given_to_all_without_replacing_anybody() -> None:
    world, hub, key = world_of(2)
    await world.settle(key)
    told = {"source": "huggingface", "repo": "org/model", "revision": "main", "commit": A}
    assert world.status(key)["model"] == told
    assert (rendered(world), commits(world, hub)) == ({A}, {A})
    assert world.kube.requests["delete", "Pod"] == 0
    assert world.condition(key, "Ready")["status"] == "True"


async def test_a_pod_that_starts_later_and_a_group_that_is_added_load_the_same() -> None:
    world, hub, key = world_of(1)
    await world.settle(key)
    hub.branch = B
    for pod in world.kube.of_kind("Pod"):
        world.kube.remove("Pod", "team", pod["metadata"]["name"])
    world.edit(key, replicas=3, dtype="float32")  # a rollout, too
    await world.settle(key)
    assert (world.serving(key), commits(world, hub), world.status(key)["model"]["commit"]) == (3, {A}, A)


@pytest.mark.parametrize("seed", range(12))
async def test_groups_that_start_at_once_and_resolve_to_different_commits_end_at_one(seed: int) -> None:
    world, hub, key = world_of(3, Random(seed))
    hub.moves = [B, C]
    await world.settle(key)
    pinned = world.status(key)["model"]["commit"]
    assert pinned in (A, B, C)
    assert (world.serving(key), commits(world, hub), rendered(world)) == (3, {pinned}, {pinned})
    events = [message for _, message in world.events()]
    assert world.condition(key, "Ready")["status"] == "True", events


@pytest.mark.parametrize("change", ["revision", "annotation"])
async def test_another_revision_or_the_annotation_moves_it_group_by_group(change: str) -> None:
    world, hub, key = world_of(2)
    await world.settle(key)
    hub.branch, before = B, pods(world)
    if change == "revision":
        world.edit(key, model={"huggingFace": {"repo": "org/model", "revision": "v2"}})
    else:
        annotate = {"lockstep.dev/resolveRevisionAt": AT}
        world.kube.change(
            "TensorParallelModel", "team", "chat", lambda live: live["metadata"].update(annotations=annotate)
        )
    await world.reconcile(key)
    assert "model" not in world.status(key)
    await world.settle(key)
    assert (world.serving(key), commits(world, hub), rendered(world)) == (2, {B}, {B})
    assert pods(world).isdisjoint(before)
    told = {"source": "huggingface", "repo": "org/model", "revision": "main", "commit": B}
    extra = {"revision": "v2"} if change == "revision" else {"resolveRevisionAt": AT}
    assert world.status(key)["model"] == told | extra


async def test_groups_that_wait_for_their_turn_keep_the_old_commit() -> None:
    world, hub, key = world_of(2)
    await world.settle(key)
    hub.branch = B
    world.edit(key, model={"huggingFace": {"repo": "org/model", "revision": "v2"}})
    world.broken = lambda pod: pod["metadata"]["name"].startswith("chat-1-")  # the new one never gets Ready
    for _ in range(30):
        await world.reconcile(key)
        for step in world.kube.steps(world.broken):
            step()
        world.time += 1
    by_name = {one["metadata"]["name"]: one for one in world.kube.of_kind("StatefulSet")}
    assert commit_of(by_name["chat-0"]["spec"]["template"]["spec"]) == A
    assert revision_of(by_name["chat-0"]["spec"]["template"]) != revision_of(by_name["chat-1"]["spec"]["template"])


async def test_a_commit_needs_no_resolution() -> None:
    world, hub, key = world_of(1)
    world.edit(key, model={"huggingFace": {"repo": "org/model", "revision": C}})
    await world.settle(key)
    assert world.status(key)["model"]["commit"] == C
    assert (rendered(world), commits(world, hub)) == ({""}, {C})


async def test_a_group_that_does_not_load_what_it_was_given_is_not_replaced_for_ever() -> None:
    world, hub, key = world_of(1)
    await world.settle(key)
    for pod in world.kube.of_kind("Pod"):
        world.kube.remove("Pod", "team", pod["metadata"]["name"])
    await world.settle(key)
    hub.loaded = dict.fromkeys(hub.loaded, B)
    await world.settle(key)
    assert world.kube.requests["delete", "Pod"] == 0


async def test_an_operator_that_is_started_anew_keeps_the_commit() -> None:
    world, hub, key = world_of(1)
    await world.settle(key)
    hub.branch, writes = B, len(world.kube.writes)
    world.operators = [world.operator()]
    await world.settle(key)
    assert world.status(key)["model"]["commit"] == A
    assert world.kube.writes[writes:] == []
