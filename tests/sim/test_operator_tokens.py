"""The tokens of a model whose Secrets nobody may read: made once, and anew when they must be."""

from __future__ import annotations

import base64
from typing import Any, Final

import pytest
from tests.support.kube_fake import revision_of
from tests.support.kube_world import KEY, KilledAtWrite, World

from lockstep_operator.decisions.tokens import AGAIN_SECONDS
from lockstep_operator.types.names import KIND, NEW_TOKENS_ANNOTATION, UPDATE_ANNOTATION, ModelKey
from lockstep_operator.types.observed import GroupReport, Object
from lockstep_operator.types.operator_key import OperatorKey
from lockstep_operator.types.timestamps import format_rfc3339

OTHER: Final = OperatorKey(b"of other operators" * 2)


def secrets(world: World) -> dict[str, str]:
    """The tokens, by the names of their Secrets."""
    found = {secret["metadata"]["name"]: secret["data"]["token"] for secret in world.kube.of_kind("Secret")}
    return {name: base64.b64decode(token).decode() for name, token in found.items()}


def expected(world: World, key: ModelKey, operators: OperatorKey, groups: OperatorKey) -> dict[str, str]:
    uid, tokens = resource(world, key)["metadata"]["uid"], world.status(key)["tokens"]["id"]
    return {
        f"chat-operator-{tokens}": operators.operator_token(uid, tokens),
        f"chat-token-{tokens}": groups.group_token(uid, tokens),
    }


def resource(world: World, key: ModelKey) -> Object:
    return world.kube.objects[KIND, key.namespace, key.name]


def pods(world: World) -> set[str]:
    return {pod["metadata"]["uid"] for pod in world.kube.of_kind("Pod")}


def told(world: World) -> list[str]:
    return [note for reason, note in world.events() if reason == "TokensMade"]


def restart(world: World, key: OperatorKey = KEY) -> None:
    world.key = key
    world.operators = [world.operator() for _ in world.operators]


async def settled(**spec: Any) -> tuple[World, ModelKey]:
    world = World()
    key = world.add(**spec)
    await world.settle(key)
    return world, key


async def test_tokens_follow_from_the_operators_key_and_an_operator_that_starts_makes_none() -> None:
    world, key = await settled()
    assert secrets(world) == expected(world, key, KEY, KEY)
    assert {target.token for target in world.groups.watched[key].values()} == {
        token for name, token in secrets(world).items() if name.startswith("chat-operator-")
    }
    writes = len(world.kube.writes)
    restart(world)
    await world.settle(key)
    assert world.kube.writes[writes:] == []
    assert told(world) == []


async def test_with_another_key_the_operators_token_is_replaced_and_no_pod() -> None:
    world, key = await settled(replicas=2)
    before = pods(world)
    restart(world, OTHER)
    await world.settle(key)
    assert secrets(world) == expected(world, key, OTHER, KEY), "pods have the group's for as long as they live"
    assert pods(world) == before
    assert world.condition(key, "Ready")["status"] == "True"
    (note,) = told(world)
    assert "made anew: the operator has another key" in note
    assert world.status(key)["tokens"]["key"] == OTHER.id


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", range(4))
async def test_an_operator_killed_while_it_replaces_a_token_leaves_the_right_one(when: str, number: int) -> None:
    world, key = await settled()
    before = pods(world)
    restart(world, OTHER)
    killed = KilledAtWrite(world.kube, when, number)
    await world.settle(key)
    assert killed.happened
    assert secrets(world) == expected(world, key, OTHER, KEY)
    assert pods(world) == before
    assert len(told(world)) == 1


async def test_new_tokens_that_are_asked_for_reach_the_groups_in_turn() -> None:
    world, key = await settled(replicas=2)
    before, old = pods(world), secrets(world)
    world.annotate(key, NEW_TOKENS_ANNOTATION, format_rfc3339(world.time))
    await world.settle(key)
    assert pods(world).isdisjoint(before)
    assert world.serving(key) == 2
    assert len({revision_of(pod) for pod in world.kube.of_kind("Pod")}) == 1
    new = expected(world, key, KEY, KEY)
    assert secrets(world) == old | new
    assert not set(old.values()) & set(new.values())


async def test_a_groups_secret_that_is_missing_is_made_as_it_was_once_a_pod_needs_it() -> None:
    world, key = await settled()
    before = secrets(world)
    world.time += 600
    (name,) = (name for name in before if name.startswith("chat-token-"))
    world.kube.remove("Secret", "team", name)
    world.kube.remove("Pod", "team", "chat-0-1", grace=0)
    await world.settle(key)
    assert secrets(world) == before
    assert world.serving(key) == 1
    assert world.condition(key, "Ready")["status"] == "True"


async def test_a_full_quota_keeps_no_token_from_being_replaced() -> None:
    world, key = await settled()
    world.kube.quotas["Secret"] = 2
    restart(world, OTHER)
    await world.settle(key)
    operators = {name: token for name, token in secrets(world).items() if name.startswith("chat-operator-")}
    assert operators.items() <= expected(world, key, OTHER, KEY).items()


async def test_a_group_that_refuses_the_operator_serves_on_and_gets_another_secret() -> None:
    """As one does whose Secret somebody has replaced."""
    world, key = await settled()
    before, right = pods(world), secrets(world)
    (name,) = (name for name in right if name.startswith("chat-operator-"))
    theirs = base64.b64encode(b"theirs").decode()
    world.kube.change("Secret", "team", name, lambda secret: secret["data"].update(token=theirs))
    world.groups.said[key, 0] = GroupReport(unreachable_since=world.time, error="no", refused=True)
    world.time += 100
    await world.reconcile(key)
    assert world.condition(key, "Ready")["status"] == "True"
    world.time += AGAIN_SECONDS
    for _ in range(3):
        await world.reconcile(key)
    assert secrets(world) == right
    assert world.condition(key, "Available")["status"] == "True"
    assert "doesn't take the operator's token" in told(world)[-1]
    del world.groups.said[key, 0]
    await world.settle(key)
    assert pods(world) == before, "it is alive"
    assert world.condition(key, "Ready")["status"] == "True"


async def test_pods_of_an_older_operator_stay_until_an_update_is_asked_for() -> None:
    """What they know nobody may read. They are not made again either, whatever else replaces them."""
    world, key = await settled(replicas=2)
    before = pods(world)
    (kept,) = world.kube.of_kind("ControllerRevision")
    name = kept["metadata"]["name"]
    world.kube.change("ControllerRevision", "team", name, lambda one: one["data"].pop("tokens"))
    restart(world)
    await world.settle(key)
    assert pods(world) == before
    assert world.status(key)["runtime"]["outdated"] is True
    world.annotate(key, UPDATE_ANNOTATION, format_rfc3339(world.time))
    await world.settle(key)
    newest = max(world.kube.of_kind("ControllerRevision"), key=lambda one: one["revision"])
    assert newest["data"]["tokens"] == world.status(key)["tokens"]["id"]
    assert world.serving(key) == 2
