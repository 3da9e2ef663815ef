"""Whatever happens in whatever order, the operator converges, tells the truth, and then is quiet."""

from __future__ import annotations

from random import Random

import pytest
from tests.support.kube_fake import Killed, clone, is_ready, revision_of
from tests.support.kube_world import World

from lockstep_operator.cluster.client import RESOURCES, KubeError
from lockstep_operator.cluster.permissions import PERMISSIONS
from lockstep_operator.types.names import ModelKey
from lockstep_operator.types.operator_key import OperatorKey

OTHER_KEY = OperatorKey(b"another operators" * 2)
CHILDREN = {
    ("Secret", "chat-token"), ("Secret", "chat-operator"), ("ServiceAccount", "chat-ranks"), ("Service", "chat"),
    ("Service", "chat-0"), ("NetworkPolicy", "chat-0"), ("StatefulSet", "chat-0"),
    ("PodDisruptionBudget", "chat"),
}  # fmt: skip


OF_GROUP = ("Service", "NetworkPolicy", "StatefulSet")


def children(world: World) -> set[tuple[str, str]]:
    quiet = ("Pod", "TensorParallelModel", "Event", "ControllerRevision")
    return {(kind, stem(kind, name)) for kind, _, name in world.kube.objects if kind not in quiet}


def stem(kind: str, name: str) -> str:
    """Of a Secret's name, which ends with whose tokens it holds."""
    return name.rpartition("-")[0] if kind == "Secret" else name


async def quiet(world: World, *keys: ModelKey) -> None:
    """Nobody writes anything any more, not even operators that have just started."""
    before = len(world.kube.writes)
    world.operators = [world.operator() for _ in world.operators]
    for key in keys:
        for operator in range(len(world.operators)):
            await world.reconcile(key, operator)
    assert world.kube.writes[before:] == []


async def test_a_new_model_becomes_ready_and_then_nothing_is_written() -> None:
    world = World()
    key = world.add()
    await world.settle(key)
    assert children(world) == CHILDREN
    assert world.condition(key, "Ready")["status"] == "True"
    assert world.status(key)["ranks"] == "2/2"
    await quiet(world, key)


async def test_a_model_that_is_first_made_is_no_drift() -> None:
    world = World()
    key = world.add(replicas=2)
    await world.settle(key)
    assert [reason for reason, _ in world.events()].count("DriftRepaired") == 0
    assert {reason for reason, _ in world.events()} == {"Created", "Ready"}


async def test_the_operator_uses_just_the_verbs_that_it_is_granted() -> None:
    world = World()
    key = world.add(replicas=2, revisionHistoryLimit=0)
    await world.settle(key)
    world.edit(key, replicas=1, dtype="float32")
    await world.settle(key)
    world.key = OTHER_KEY
    restart(world)
    world.edit(key, disruption={"budget": "None"})
    await world.settle(key)
    for kind, name in [("ServiceAccount", "chat-ranks"), *((kind, "chat-0") for kind in OF_GROUP)]:
        world.kube.remove(kind, "team", name)
    world.kube.change("Service", "team", "chat", lambda live: live["spec"]["ports"][0].update(port=81))
    await world.settle(key)
    verbs = {"apply": ("create", "patch"), "status": ("patch",), "find": ("list",)}
    used = {
        (RESOURCES[kind][1] + ("/status" if verb == "status" else ""), allowed)
        for verb, kind in world.kube.requests
        for allowed in verbs.get(verb, (verb,))
    }
    granted = {((p.group, p.resource), verb) for p in PERMISSIONS for verb in p.verbs if verb != "watch"}
    used_by_group = {((group_of(name), name), verb) for name, verb in used}
    # kopf lists what it watches; Events of pods are read only when one is stuck.
    by_kopf = {((p.group, p.resource), "list") for p in PERMISSIONS if "watch" in p.verbs}
    stuck = {(("", "events"), "list")}
    assert used_by_group | by_kopf | stuck == granted


def restart(world: World) -> None:
    world.operators = [world.operator() for _ in world.operators]


def group_of(name: str) -> str:
    versions = {plural: version for version, plural in RESOURCES.values()}
    version = versions[name.removesuffix("/status")]
    return version.rpartition("/")[0]


@pytest.mark.parametrize("kind_name", sorted(one for one in CHILDREN if one[0] != "Secret"))
async def test_a_deleted_child_comes_back(kind_name: tuple[str, str]) -> None:
    world = World()
    key = world.add()
    await world.settle(key)
    world.kube.remove(kind_name[0], "team", kind_name[1])
    await world.settle(key)
    assert children(world) == CHILDREN
    assert world.condition(key, "Ready")["status"] == "True"
    assert any(reason == "DriftRepaired" and kind_name[1] in note for reason, note in world.events())
    await quiet(world, key)


async def test_an_edited_child_is_put_right_and_an_event_says_what_was_wrong() -> None:
    world = World()
    key = world.add()
    await world.settle(key)
    world.kube.change("Service", "team", "chat", lambda live: live["spec"]["ports"][0].update(port=81))
    await world.settle(key)
    assert world.kube.objects["Service", "team", "chat"]["spec"]["ports"][0]["port"] == 8000
    note = next(note for reason, note in world.events() if reason == "DriftRepaired")
    assert "spec.ports[0].port: 81 instead of 8000" in note
    await quiet(world, key)


async def test_an_added_container_is_taken_out_again() -> None:
    world = World()
    key = world.add()
    await world.settle(key)
    extra = {"name": "miner", "image": "miner:1"}
    world.kube.change(
        "StatefulSet", "team", "chat-0", lambda live: live["spec"]["template"]["spec"]["containers"].append(extra)
    )
    await world.settle(key)
    template = world.kube.objects["StatefulSet", "team", "chat-0"]["spec"]["template"]
    assert [container["name"] for container in template["spec"]["containers"]] == ["lockstep"]
    await quiet(world, key)


async def test_what_others_add_stays() -> None:
    world = World()
    key = world.add()
    await world.settle(key)
    world.kube.change("Service", "team", "chat", lambda live: live["metadata"]["labels"].update(team="blue"))
    await quiet(world, key)
    assert world.kube.objects["Service", "team", "chat"]["metadata"]["labels"]["team"] == "blue"


async def test_a_field_that_the_server_rewrites_is_applied_once_per_process_and_not_for_ever() -> None:
    world = World()
    key = world.add()
    world.kube.admit = lambda live: live["spec"].update(type="LoadBalancer") if live["kind"] == "Service" else None
    await world.settle(key)
    before = len(world.kube.writes)
    await world.reconcile(key)
    assert world.kube.writes[before:] == []
    assert "DriftRepaired" not in {reason for reason, _ in world.events()}


async def test_scaling_down_removes_the_highest_groups_and_their_services_after_their_pods() -> None:
    world = World()
    key = world.add(replicas=3)
    await world.settle(key)
    world.edit(key, replicas=1)
    await world.reconcile(key)
    assert ("Service", "team", "chat-2") in world.kube.objects, "pods that finish their requests still need their names"
    assert world.condition(key, "Ready")["reason"] == "ScalingDown"
    await world.settle(key)
    assert children(world) == CHILDREN
    assert world.serving(key) == 1
    await quiet(world, key)


async def test_scaled_to_zero_says_so() -> None:
    world = World()
    key = world.add(replicas=2)
    await world.settle(key)
    world.edit(key, replicas=0)
    await world.settle(key)
    status = world.status(key)
    assert (status["replicas"], status["readyReplicas"], status["ranks"]) == (0, 0, "0/0")
    assert world.condition(key, "Ready")["reason"] == "ScaledToZero"
    assert world.condition(key, "Available")["status"] == "False"
    await quiet(world, key)


async def test_a_rollout_takes_one_group_at_a_time() -> None:
    world = World(random=Random(5))
    key = world.add(replicas=3)
    await world.settle(key)
    world.edit(key, dtype="float32")
    fewest = 3
    for _ in range(300):
        await world.reconcile(key)
        steps = world.kube.steps(world.broken)
        if steps:
            world.random.choice(steps)()
        fewest = min(fewest, world.serving(key))
    assert fewest == 2
    await world.settle(key)
    assert len({revision_of(pod) for pod in world.kube.of_kind("Pod")}) == 1
    assert world.condition(key, "Ready")["status"] == "True"
    await quiet(world, key)


async def test_a_broken_spec_stops_after_the_first_group_and_mending_it_goes_on() -> None:
    world = World(random=Random(3))
    key = world.add(replicas=3)
    await world.settle(key)
    world.broken = lambda pod: "--dtype=float32" in pod["spec"]["containers"][0]["args"]
    world.edit(key, dtype="float32")
    await world.settle(key)
    assert world.serving(key) == 2
    ready = world.condition(key, "Ready")
    assert (ready["status"], ready["reason"]) == ("False", "RollingOut")
    assert "keeps revision" in ready["message"]
    assert world.status(key)["readyReplicas"] == 2
    world.edit(key, dtype="bfloat16")
    await world.settle(key)
    assert world.serving(key) == 3
    assert world.condition(key, "Ready")["status"] == "True"
    await quiet(world, key)


async def test_a_changed_size_replaces_the_group() -> None:
    world = World()
    key = world.add()
    await world.settle(key)
    world.edit(key, tensorParallelSize=4)
    world.groups.said.clear()
    await world.settle(key)
    assert world.serving(key, size=4) == 1


async def test_models_do_not_touch_each_other() -> None:
    world = World()
    keys = [world.add(name, namespace) for name in ("chat", "code") for namespace in ("team", "other")]
    await world.settle(*keys)
    assert all(world.serving(key) == 1 for key in keys)
    world.kube.remove("TensorParallelModel", "team", "chat")
    await world.settle(*keys)
    left = {(namespace, name) for kind, namespace, name in world.kube.objects if kind == "StatefulSet"}
    assert left == {("team", "code-0"), ("other", "chat-0"), ("other", "code-0")}


async def test_a_deleted_model_leaves_nothing_even_when_the_operator_is_away() -> None:
    world = World()
    key = world.add(replicas=2)
    await world.settle(key)
    world.kube.remove("TensorParallelModel", "team", "chat")
    while steps := world.kube.steps(world.broken):
        steps[0]()
    assert {kind for kind, _, _ in world.kube.objects} == {"Event"}


async def test_a_service_of_somebody_else_is_not_taken_over() -> None:
    world = World()
    foreign = {"metadata": {"name": "chat", "namespace": "team"}, "spec": {"ports": []}}
    world.kube.put("Service", foreign)
    key = world.add()
    await world.settle(key)
    assert world.kube.objects["Service", "team", "chat"]["spec"] == {"ports": []}
    stalled = world.condition(key, "Stalled")
    assert (stalled["status"], stalled["reason"]) == ("True", "NameConflict")
    assert "delete it, or give the model another name" in stalled["message"]
    world.kube.remove("Service", "team", "chat")
    await world.settle(key)
    assert world.condition(key, "Ready")["status"] == "True"


async def test_our_token_is_not_sent_to_pods_of_somebody_elses_workload() -> None:
    """Their StatefulSet has a group's name, and their pods its labels."""
    world = World()
    key = world.add(replicas=2)
    await world.settle(key)
    theirs = world.kube.objects["StatefulSet", "team", "chat-1"]
    for kind, namespace, name in list(world.kube.objects):
        if name.startswith("chat-1") and kind in ("StatefulSet", "Pod"):
            world.kube.remove(kind, namespace, name, grace=0)
    metadata = {name: value for name, value in theirs["metadata"].items() if name != "ownerReferences"}
    world.kube.put("StatefulSet", {**theirs, "metadata": metadata})
    await world.settle(key)
    pods = [pod["metadata"]["name"] for pod in world.kube.of_kind("Pod") if is_ready(pod)]
    assert sorted(pods) == ["chat-0-0", "chat-0-1", "chat-1-0", "chat-1-1"], "theirs run"
    assert world.condition(key, "Stalled")["reason"] == "NameConflict"
    assert sorted(world.groups.watched[key]) == [0]


@pytest.mark.parametrize(
    "meddled",
    [
        {"ordinals": {"start": 5}},
        {"minReadySeconds": 600},
        {"persistentVolumeClaimRetentionPolicy": {"whenDeleted": "Delete", "whenScaled": "Retain"}},
        {"persistentVolumeClaimRetentionPolicy": {"whenDeleted": "Retain", "whenScaled": "Delete"}},
    ],
)
async def test_what_others_set_on_a_groups_workload_is_put_right(meddled: dict[str, object]) -> None:
    world = World()
    key = world.add()
    await world.settle(key)
    wanted = world.kube.objects["StatefulSet", "team", "chat-0"]
    before = clone(wanted["spec"])
    world.kube.change("StatefulSet", "team", "chat-0", lambda live: live["spec"].update(meddled))
    assert world.kube.objects["StatefulSet", "team", "chat-0"]["spec"] != before
    await world.settle(key)
    mended = world.kube.objects["StatefulSet", "team", "chat-0"]
    assert mended["spec"] == before
    assert mended["metadata"]["uid"] == wanted["metadata"]["uid"], "it was not made anew, and its pods stay"


async def test_what_the_api_server_refuses_is_in_the_status() -> None:
    world = World()
    key = world.add(template={"spec": {"priorityClassName": 7}})
    await world.reconcile(key)
    await world.reconcile(key)
    stalled = world.condition(key, "Stalled")
    assert (stalled["status"], stalled["reason"]) == ("True", "Refused")
    assert ".spec.template.spec.priorityClassName: expected string" in stalled["message"]
    world.edit(key, template={})
    await world.settle(key)
    assert world.condition(key, "Ready")["status"] == "True"


async def test_a_busy_api_server_is_tried_again() -> None:
    world = World()
    key = world.add()

    def busy(verb: str, kind: str, name: str) -> None:
        if world.random.random() < 0.5:
            raise KubeError(503, "ServiceUnavailable", "try later")

    world.kube.before_write = busy
    for _ in range(24):
        await world.reconcile(key)
    world.kube.before_write = lambda verb, kind, name: None
    await world.settle(key)
    assert world.condition(key, "Ready")["status"] == "True"


@pytest.mark.parametrize("seed", range(24))
async def test_random_orders_kills_and_a_second_operator_change_nothing_in_the_end(seed: int) -> None:
    random = Random(seed)
    world = World(operators=1 + seed % 2, random=random)
    key = world.add(replicas=random.randint(1, 3))
    changes = [
        lambda: world.edit(key, replicas=random.randint(0, 3)),
        lambda: world.edit(key, dtype=random.choice(["float32", "bfloat16", "float16"])),
        lambda: world.edit(key, tensorParallelSize=random.choice([2, 4])),
        lambda: world.kube.remove(*random.choice(removable)) if (removable := deletable(world)) else None,
    ]

    def die(verb: str, kind: str, name: str) -> None:
        if random.random() < 0.1:
            raise Killed

    world.kube.before_write = world.kube.after_write = die
    for _ in range(120):
        move = random.random()
        if move < 0.5:
            await world.reconcile(key, random.randrange(len(world.operators)))
        elif move < 0.95:
            if steps := world.kube.steps(world.broken):
                random.choice(steps)()
        else:
            random.choice(changes)()
        world.time += random.random()
    world.kube.before_write = world.kube.after_write = lambda verb, kind, name: None
    await world.settle(key)
    spec = world.kube.objects["TensorParallelModel", "team", "chat"]["spec"]
    assert world.serving(key, size=spec["tensorParallelSize"]) == spec["replicas"]
    assert len(world.kube.of_kind("StatefulSet")) == spec["replicas"]
    assert len(world.kube.of_kind("Service")) == spec["replicas"] + 1
    assert world.condition(key, "Ready")["status"] == "True"
    await quiet(world, key)


def deletable(world: World) -> list[tuple[str, str, str]]:
    kinds = ("Secret", "Service", "StatefulSet", "ServiceAccount", "NetworkPolicy", "Pod")
    return [identity for identity in sorted(world.kube.objects) if identity[0] in kinds]
