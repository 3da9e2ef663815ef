"""`kubectl lockstep plan` says what the operator then does: the same changes are made in a fake cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.support.kube_world import World

from lockstep_operator.plugin.plan import Plan, plan, pod_manifest, text, understood, with_kept
from lockstep_operator.types.names import (
    FENCED_ANNOTATION,
    PAUSED_ANNOTATION,
    ROLLBACK_ANNOTATION,
    UPDATE_ANNOTATION,
    ModelKey,
)
from lockstep_operator.types.observed import Object
from lockstep_operator.types.timestamps import format_rfc3339


def live(world: World, key: ModelKey) -> Object:
    return world.kube.objects["TensorParallelModel", key.namespace, key.name]


async def serving(**spec: Any) -> tuple[World, ModelKey]:
    world = World()
    key = world.add(**spec)
    await world.settle(key)
    return world, key


async def planned(world: World, key: ModelKey, annotations: Mapping[str, str] | None = None, **spec: Any) -> Plan:
    before = live(world, key)
    wanted = {**before, "spec": {name: item for name, item in {**before["spec"], **spec}.items() if item is not None}}
    if annotations is not None:
        wanted = {**wanted, "metadata": {**before["metadata"], "annotations": annotations}}
    kinds = ("StatefulSet", "Pod", "ControllerRevision")
    return plan(before, wanted, [{**one, "kind": kind} for kind in kinds for one in world.kube.of_kind(kind)])


async def followed(world: World, key: ModelKey) -> list[str]:
    """StatefulSets that the operator then writes."""
    written: list[str] = []
    world.kube.after_write = lambda verb, kind, name: (
        written.append(name) if (verb, kind) == ("apply", "StatefulSet") else None
    )
    await world.settle(key)
    return written


async def test_a_change_of_the_pods_replaces_groups_in_the_operators_order() -> None:
    world, key = await serving(replicas=3)
    found = await planned(world, key, engine={"maxSequences": 32})
    assert [(one.path, one.after, one.restarts) for one in found.changes] == [("spec.engine.maxSequences", 32, True)]
    assert found.turns == [[2], [1], [0]]
    assert "turn 1: group 2 is replaced" in text(found)
    assert "meanwhile 2 of 3 groups serve" in text(found)
    world.edit(key, engine={"maxSequences": 32})
    assert await followed(world, key) == ["chat-2", "chat-1", "chat-0"], "what the operator then does"


async def test_several_at_a_time_when_the_spec_allows_it() -> None:
    world, key = await serving(replicas=3)
    found = await planned(world, key, rollout={"maxUnavailable": 2}, dtype="bfloat16")
    assert [sorted(turn) for turn in found.turns] == [[1, 2], [0]]
    assert {one.path: one.restarts for one in found.changes} == {
        "spec.dtype": True,
        "spec.rollout.maxUnavailable": False,
    }


async def test_surge_groups_stand_in_where_the_spec_has_them() -> None:
    world, key = await serving()
    found = await planned(world, key, rollout={"maxSurge": 1, "maxUnavailable": 0}, dtype="bfloat16")
    assert (found.turns, found.surge) == ([[0]], [1])
    assert "group 1 is made first" in text(found)
    assert "meanwhile 1 of 1 groups serve" in text(found)


async def test_what_restarts_nothing_is_said_to_restart_nothing() -> None:
    world, key = await serving(replicas=2)
    found = await planned(world, key, recovery={"mode": "Observe"}, progressDeadline="5m")
    assert not found.turns
    assert all(not one.restarts for one in found.changes)
    assert text(await planned(world, key)) == "chat: nothing changes"


async def test_scaling_creates_and_removes_groups_and_replaces_none() -> None:
    world, key = await serving(replicas=2)
    more = await planned(world, key, replicas=4)
    assert (list(more.created), list(more.removed), list(more.turns)) == ([2, 3], [], [])
    fewer = await planned(world, key, replicas=1)
    assert (list(fewer.created), list(fewer.removed), list(fewer.turns)) == ([], [1], [])


async def test_an_only_group_that_is_replaced_is_an_outage_of_its_measured_start() -> None:
    world, key = await serving()
    live(world, key)["status"]["groups"][0]["startSeconds"] = 41.0
    words = text(await planned(world, key, dtype="bfloat16"))
    assert "about 41 s, as their last start took; meanwhile NO GROUP SERVES" in words


async def test_a_new_model_creates_its_groups() -> None:
    world, key = await serving(replicas=2)
    found = plan(None, live(world, key), [])
    assert list(found.created) == [0, 1]
    assert text(found) == "chat: groups 0, 1 are created"


async def test_groups_below_the_partition_keep_their_pods() -> None:
    world, key = await serving(replicas=3)
    canary: dict[str, Any] = {"rollout": {"partition": 2}, "dtype": "bfloat16"}
    found = await planned(world, key, **canary)
    assert (found.turns, found.held) == ([[2]], [0, 1])
    assert "groups 0, 1 are below rollout.partition" in text(found)
    world.edit(key, **canary)
    assert await followed(world, key) == ["chat-2"], "what the operator then does"
    onwards = await planned(world, key, rollout={"partition": 0})
    assert (onwards.turns, onwards.held) == ([[1], [0]], [])
    world.edit(key, rollout={"partition": 0})
    assert await followed(world, key) == ["chat-1", "chat-0"]


async def test_a_rollback_replaces_groups_and_ends_with_the_next_change() -> None:
    world, key = await serving()
    [first] = [one["metadata"]["labels"]["lockstep.dev/revision"] for one in world.kube.of_kind("ControllerRevision")]
    world.edit(key, dtype="bfloat16")
    await world.settle(key)
    back = {ROLLBACK_ANNOTATION: first}
    found = await planned(world, key, back)
    assert [(one.path, one.restarts) for one in found.changes] == [
        (f"metadata.annotations.{ROLLBACK_ANNOTATION}", True)
    ]
    assert found.turns == [[0]]
    assert f"pods are those of revision {first} until" in text(found)
    world.annotate(key, ROLLBACK_ANNOTATION, first)
    assert await followed(world, key) == ["chat-0"], "what the operator then does"
    assert text(await planned(world, key)) == "chat: nothing changes"
    assert (await planned(world, key, {})).turns == [[0]], "without the annotation the spec counts again"
    onwards = await planned(world, key, dtype="float16")
    assert onwards.turns == [[0]]
    assert not any("pods are those of" in note for note in onwards.notes)


async def test_a_rollback_to_what_is_not_kept_changes_nothing_and_is_told() -> None:
    world, key = await serving()
    found = await planned(world, key, {ROLLBACK_ANNOTATION: "0123456789abcdef"})
    assert not found.turns
    assert "isn't kept: pods follow the spec" in text(found)


async def test_a_newer_runtime_comes_along_with_whatever_shapes_pods_and_with_nothing_else() -> None:
    world, key = await serving(replicas=2)
    default: dict[str, Any] = {"backend": "auto"}  # says what holds anyway
    same = await planned(world, key, **default)
    assert (same.turns, [one.restarts for one in same.changes]) == ([], [False])
    world.upgrade(runtime_image="runtime:2", log_format="json")
    await world.settle(key)
    assert text(await planned(world, key)) == "chat: nothing changes"
    assert not (await planned(world, key, progressDeadline="5m")).turns
    found = await planned(world, key, **default)
    assert (found.turns, [one.restarts for one in found.changes]) == ([[1], [0]], [True])
    assert "the runtime is updated along with that" in text(found)
    world.edit(key, **default)
    assert await followed(world, key) == ["chat-1", "chat-0"], "what the operator then does"


async def test_an_update_of_the_runtime_replaces_groups_if_there_is_a_newer_one() -> None:
    world, key = await serving()
    asked = {UPDATE_ANNOTATION: format_rfc3339(world.time)}
    assert not (await planned(world, key, asked)).turns
    world.upgrade(runtime_image="runtime:2")
    await world.settle(key)
    assert (await planned(world, key, asked)).turns == [[0]]
    automatic = await planned(world, key, runtime={"update": "Auto"})
    assert automatic.turns == [[0]]
    assert "when it is this model's turn" in text(automatic)


async def test_nothing_is_done_about_a_model_that_is_paused_and_groups_that_are_fenced() -> None:
    world, key = await serving(replicas=2)
    paused = await planned(world, key, {PAUSED_ANNOTATION: "true"}, dtype="bfloat16")
    assert not paused.turns
    assert f"nothing is done as long as it has the annotation {PAUSED_ANNOTATION}" in text(paused)
    fenced = await planned(world, key, {FENCED_ANNOTATION: "1"}, dtype="bfloat16")
    assert fenced.turns == [[0]]


async def test_a_model_whose_template_is_flawed_now_is_mended() -> None:
    world, key = await serving()
    world.edit(key, template={"spec": {"containers": [{"name": "lockstep", "env": {"A": "b"}}]}})
    await world.settle(key)
    found = await planned(world, key, template={})
    assert not found.flaw
    assert [one.path for one in found.changes] == ["spec.template.spec.containers"]


async def test_a_flaw_that_the_api_server_takes_is_told() -> None:
    world, key = await serving()
    found = await planned(world, key, template={"spec": {"containers": [{"name": "lockstep", "env": {"A": "b"}}]}})
    assert found.flaw
    assert "the operator would keep the pods as they are" in text(found)


async def test_the_pod_that_is_tried_has_the_image_of_those_that_run() -> None:
    world, key = await serving()
    objects = [{**one, "kind": "StatefulSet"} for one in world.kube.of_kind("StatefulSet")]
    tried = pod_manifest(understood(live(world, key)), objects)
    assert tried["spec"]["containers"][0]["image"] == objects[0]["spec"]["template"]["spec"]["containers"][0]["image"]
    assert tried["spec"]["serviceAccountName"] == "default"


def test_an_autoscalers_replicas_stay_where_the_file_has_none() -> None:
    file: Object = {"metadata": {"name": "chat"}, "spec": {"dtype": "auto"}}
    before: Object = {"metadata": {"annotations": {"a": "b"}}, "spec": {"replicas": 5, "dtype": "float32"}}
    kept = with_kept(file, before)
    assert kept["spec"] == {"replicas": 5, "dtype": "auto"}
    assert kept["metadata"]["annotations"] == {"a": "b"}
    assert with_kept({**file, "spec": {"replicas": 1}}, before)["spec"]["replicas"] == 1
    assert with_kept(file, None) == file


def test_a_hub_that_only_the_operator_knows_is_no_flaw() -> None:
    hub = {"huggingFace": {"repo": "a/b", "source": "corp"}}
    metadata = {"name": "chat", "namespace": "team", "uid": "u"}
    assert understood({"metadata": metadata, "spec": {"model": hub, "tensorParallelSize": 1}}).flaw == ""
