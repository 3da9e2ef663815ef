"""Whatever fails in a pass, its end says so in the status, and nothing else is held up by it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import msgspec
import pytest
from tests.support.kube_world import World, well

from lockstep_operator.cluster.client import KubeError
from lockstep_operator.decisions import manifests, recovery_policy
from lockstep_operator.types.names import KIND, ModelKey
from lockstep_operator.types.observed import GroupReport, Object
from lockstep_runtime.protocol.status import Fault, FaultRecord, GroupState

TYPO = {"spec": {"nodeSelectr": {"a": "b"}}}


async def serving(**spec: Any) -> tuple[World, ModelKey]:
    world = World()
    key = world.add(**({"replicas": 2} | spec))
    await world.settle(key)
    assert world.condition(key, "Ready")["status"] == "True"
    return world, key


async def live(world: World, key: ModelKey, seconds: float) -> None:
    """As the queue does: the next pass when the last one asked for it, or when something happens."""
    end = world.time + seconds
    while world.time < end:
        delay = await world.reconcile(key)
        assert delay is not None
        steps = world.kube.steps(world.broken)
        for step in steps:
            step()
        world.time += 0.2 if steps else min(max(delay, 0.2), 15.0)


def poison(world: World, key: ModelKey, group: int) -> set[str]:
    """Rank 1 of the group hangs until its pod is another. Returns the UIDs of the group's pods."""
    pods = [pod for pod in world.kube.of_kind("Pod") if pod["metadata"]["labels"]["lockstep.dev/group"] == str(group)]
    fault = FaultRecord(id=1, fault=Fault.HANG, rank=1, message="it stopped", at=world.time, epoch=1)
    status = well(key, group, "inc", "rev")
    status = msgspec.structs.replace(status, state=GroupState.POISONED, since=world.time, faults=[fault])
    world.groups.said[key, group] = GroupReport(status=status)
    world.broken = lambda pod: pod["metadata"]["name"] == f"chat-{group}-0" and (key, group) in world.groups.said
    return {pod["metadata"]["uid"] for pod in pods}


def mend_when_recycled(world: World, key: ModelKey, group: int, before: set[str]) -> bool:
    now = {pod["metadata"]["uid"] for pod in world.kube.of_kind("Pod")}
    if not before <= now:
        world.groups.said.pop((key, group), None)
        return True
    return False


def generation(world: World, key: ModelKey) -> int:
    return int(world.kube.objects[KIND, key.namespace, key.name]["metadata"]["generation"])


async def recycled(world: World, key: ModelKey, group: int, seconds: float) -> None:
    """The group falls ill, its pod is replaced within that time, and it serves again."""
    before = poison(world, key, group)
    end = world.time + seconds
    while not mend_when_recycled(world, key, group, before):
        assert world.time < end, world.status(key)
        await live(world, key, 2.0)
    await live(world, key, 30.0)
    block = next(block for block in world.status(key)["groups"] if block["group"] == group)
    assert (block["state"], block["ready"]) == ("Ready", True)


async def test_a_typo_in_the_template_is_told_in_the_servers_words_and_recovery_goes_on() -> None:
    world, key = await serving()
    world.edit(key, template=TYPO)
    await live(world, key, 15.0)
    stalled = world.condition(key, "Stalled")
    assert (stalled["status"], stalled["reason"]) == ("True", "Refused")
    assert ".spec.template.spec.nodeSelectr: field not declared in schema" in stalled["message"]
    assert world.status(key)["observedGeneration"] == generation(world, key) == 2
    assert world.condition(key, "Available")["status"] == "True"
    assert [reason for reason, _ in world.events()].count("Refused") == 1
    assert "NotReady" not in {reason for reason, _ in world.events()}, "one Event for one thing"
    for group in (0, 1):  # also the one whose turn it is to take what is refused
        await recycled(world, key, group, 30.0)
        assert world.condition(key, "Stalled")["reason"] == "Refused"
    world.edit(key, template={})
    await live(world, key, 15.0)
    assert world.condition(key, "Ready")["status"] == "True"
    assert world.condition(key, "Stalled")["status"] == "False"


async def test_what_is_refused_is_tried_again_ever_more_seldom() -> None:
    world, key = await serving()
    world.edit(key, template=TYPO)
    await live(world, key, 60.0)
    tries: list[float] = []
    world.kube.before_write = lambda verb, kind, name: tries.append(world.time) if kind == "StatefulSet" else None
    await live(world, key, 3600.0)
    assert 8 <= len(tries) <= 40


@pytest.mark.parametrize("replicas", [1, 2])
async def test_a_webhook_that_is_away_is_told_and_waited_for(replicas: int) -> None:
    world, key = await serving(replicas=replicas)
    world.kube.webhooks_down.add("StatefulSet")
    world.edit(key, dtype="float32")
    await live(world, key, 20.0)
    reconciling = world.condition(key, "Reconciling")
    assert (reconciling["status"], reconciling["reason"]) == ("True", "Retrying")
    assert 'failed calling webhook "no.dev"' in reconciling["message"]
    assert world.condition(key, "Stalled")["status"] == "False"
    world.operators = [world.operator()]
    await world.reconcile(key)
    assert world.condition(key, "Reconciling")["reason"] == "Retrying", "an operator that has just started knows"
    world.kube.webhooks_down.clear()
    await world.settle(key)
    assert world.condition(key, "Ready")["status"] == "True"


async def test_a_full_quota_is_waited_for_and_what_fits_goes_on() -> None:
    world, key = await serving(replicas=1)
    world.kube.quotas["StatefulSet"] = 1
    world.edit(key, replicas=2)
    await live(world, key, 20.0)
    assert world.condition(key, "Reconciling")["reason"] == "Retrying"
    assert "exceeded quota" in world.condition(key, "Ready")["message"]
    assert world.condition(key, "Available")["status"] == "True"
    await recycled(world, key, 0, 30.0)
    world.kube.quotas.clear()
    await world.settle(key)
    assert world.serving(key) == 2


async def test_an_old_crd_costs_a_field_and_nothing_else() -> None:
    world, key = await serving()
    world.kube.crd_lacks = frozenset({"status.groups.waiting", "status.groups.readyRanks"})
    world.operators = [world.operator()]
    for block in world.kube.objects[KIND, "team", "chat"]["status"]["groups"]:
        del block["readyRanks"]
    await recycled(world, key, 0, 30.0)
    assert "readyRanks" not in world.status(key)["groups"][0]
    assert world.condition(key, "Ready")["status"] == "True"
    writes = len(world.kube.writes)
    await world.reconcile(key)
    assert world.kube.writes[writes:] == [], "what is left out is no reason to write again"


async def test_a_status_that_is_refused_for_another_reason_keeps_what_recovery_needs() -> None:
    world, key = await serving()
    whole = world.kube.apply_status

    async def picky(kind: str, manifest: dict[str, dict[str, list[dict[str, object]]]]) -> object:
        if any("state" in block for block in manifest["status"]["groups"]):
            raise KubeError(422, "Invalid", "status.groups[0].state: Unsupported value")
        return await whole(kind, manifest)

    world.kube.apply_status = picky  # type: ignore[assignment, method-assign]
    before = poison(world, key, 0)
    await live(world, key, 30.0)
    assert mend_when_recycled(world, key, 0, before)


async def test_with_a_status_that_is_refused_in_every_form_recovery_still_goes_on() -> None:
    world, key = await serving()

    def refuse(verb: str, kind: str, name: str) -> None:
        if verb == "status":
            raise KubeError(422, "Invalid", "status: Invalid value: no status will do")

    world.kube.before_write = refuse
    before = poison(world, key, 0)
    await live(world, key, 30.0)
    assert mend_when_recycled(world, key, 0, before)
    await live(world, key, 30.0)
    assert world.serving(key) == 2
    world.kube.before_write = lambda verb, kind, name: None
    await live(world, key, 120.0)
    assert world.status(key)["recoveries"] == 1, "and it is written as soon as it can be"
    await world.settle(key)
    assert world.condition(key, "Ready")["status"] == "True"


@pytest.mark.parametrize(
    ("module", "where"), [(manifests, "of_group"), (recovery_policy, "decide"), (manifests, "shared")]
)
async def test_a_bug_is_told_and_holds_up_no_other_decision(
    module: ModuleType, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, key = await serving()
    real = getattr(module, where)

    def broken(*arguments: object) -> object:
        if where == "shared" or arguments[1] == 1 or "/1" in str(getattr(arguments[1], "seed", "")):
            raise ZeroDivisionError("division by zero")
        return real(*arguments)

    monkeypatch.setattr(module, where, broken)
    await recycled(world, key, 0, 30.0)
    stalled = world.condition(key, "Stalled")
    assert (stalled["status"], stalled["reason"]) == ("True", "OperatorError")
    assert "ZeroDivisionError: division by zero" in stalled["message"]
    monkeypatch.undo()
    await world.settle(key)
    assert world.condition(key, "Ready")["status"] == "True"


async def test_a_bug_outside_of_decisions_is_in_the_status_too(monkeypatch: pytest.MonkeyPatch) -> None:
    world, key = await serving()

    def broken(*arguments: object, **named: object) -> None:
        raise AttributeError("'str' object has no attribute 'get'")

    monkeypatch.setattr("lockstep_operator.reporting.document.document", broken)
    await live(world, key, 15.0)
    stalled = world.condition(key, "Stalled")
    assert (stalled["status"], stalled["reason"]) == ("True", "OperatorError")
    assert world.condition(key, "Available")["status"] == "True", "what was known stays"
    assert len(world.kube.writes) < 60


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            {"terminationGracePeriodSeconds": "60s"},
            "template.spec.terminationGracePeriodSeconds: expected `int | null`, got `str`",
        ),
        ({"containers": None}, "template.spec.containers: expected `array`, got `null`"),
        ({"containers": {"lockstep": {}}}, "template.spec.containers: expected `array`, got `object`"),
        ({"containers": "x"}, "template.spec.containers: expected `array`, got `str`"),
        ({"containers": ["x"]}, "template.spec.containers[0]: expected `object`, got `str`"),
        ({"containers": [{"image": "x"}]}, "template.spec.containers[0]: object missing required field `name`"),
        (
            {"containers": [{"name": "lockstep", "env": {"A": "b"}}]},
            "template.spec.containers[0].env: expected `array | null`, got `object`",
        ),
        (
            {"containers": [{"name": "lockstep", "resources": "1"}]},
            "containers[0].resources: expected `object | null`, got `str`",
        ),
        ({"affinity": "x"}, "template.spec.affinity: expected `object | null`, got `str`"),
        ({"tolerations": ["x"]}, "template.spec.tolerations[0]: expected `object`, got `str`"),
    ],
)
async def test_a_template_of_no_shape_is_a_sentence_and_recovery_goes_on(
    template: dict[str, object], words: str
) -> None:
    world, key = await serving()
    world.edit(key, template={"spec": template})
    await live(world, key, 15.0)
    stalled = world.condition(key, "Stalled")
    assert (stalled["status"], stalled["reason"]) == ("True", "InvalidSpec")
    assert words in stalled["message"]
    assert world.status(key)["observedGeneration"] == 2
    await recycled(world, key, 0, 30.0)
    world.edit(key, template={})
    await world.settle(key)
    assert world.condition(key, "Ready")["status"] == "True"


async def test_a_null_grace_is_kubernetes_own() -> None:
    world, _ = await serving(template={"spec": {"terminationGracePeriodSeconds": None}})
    spec = world.kube.objects["StatefulSet", "team", "chat-0"]["spec"]["template"]["spec"]
    assert "terminationGracePeriodSeconds" not in spec
    assert "--grace-seconds=22.0" in spec["containers"][0]["args"], "30 s, less what the ends of it take"


async def test_a_namespace_that_is_being_deleted_causes_no_warnings(caplog: pytest.LogCaptureFixture) -> None:
    world, key = await serving()
    told = world.events()
    world.kube.ending.add("team")
    for pod in world.kube.of_kind("Pod"):  # whose StatefulSets go a moment later
        world.kube.objects.pop(("Pod", "team", pod["metadata"]["name"]))
    await world.reconcile(key)
    for index in (0, 1):
        world.kube.remove("StatefulSet", "team", f"chat-{index}")
    await live(world, key, 60.0)
    assert world.events() == told
    assert world.condition(key, "Stalled")["status"] == "False"
    assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


@pytest.mark.parametrize("whole_namespace", [True, False])
async def test_what_goes_while_it_is_looked_at_causes_no_warnings(
    caplog: pytest.LogCaptureFixture, whole_namespace: bool
) -> None:
    world, key = await serving()
    find = world.kube.find

    async def late(kind: str, namespace: str, *, labels: str = "", fields: str = "") -> list[Object]:
        for gone in [one for one in world.kube.objects if whole_namespace or one[0] == KIND]:
            del world.kube.objects[gone]
        world.kube.gone |= {namespace} if whole_namespace else set()
        return await find(kind, namespace, labels=labels, fields=fields)

    world.edit(key, replicas=3)
    world.kube.find = late  # type: ignore[method-assign]
    for _ in range(3):
        await world.reconcile(key)
        world.time += 1
    assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


async def test_models_whose_names_collide_do_each_other_no_harm() -> None:
    """Group 1 of `foo` has a headless Service foo-1; a model `foo-1` serves by a Service of that name."""
    world = World()
    first = world.add("foo-1")
    await world.settle(first)
    second = world.add("foo", replicas=2)
    uid = world.kube.objects["Service", "team", "foo-1"]["metadata"]["uid"]
    await world.settle(first, second)
    assert world.condition(first, "Ready")["status"] == "True"
    conflict = world.condition(second, "Stalled")
    assert (conflict["status"], conflict["reason"]) == ("True", "NameConflict")
    assert "Service foo-1 exists and belongs to TensorParallelModel foo-1" in conflict["message"]
    assert world.condition(second, "Available")["status"] == "True", "its other group serves"
    assert world.serving(second) == 1
    world.edit(second, dtype="float32")
    await world.settle(first, second)
    args = world.kube.objects["StatefulSet", "team", "foo-0"]["spec"]["template"]["spec"]["containers"][0]["args"]
    assert "--dtype=float32" in args, "and takes changes"
    service = world.kube.objects["Service", "team", "foo-1"]
    assert (service["metadata"]["uid"], service["spec"]["type"]) == (uid, "ClusterIP")
    world.kube.remove(KIND, "team", "foo-1")
    await world.settle(second)
    assert world.serving(second) == 2
    assert world.condition(second, "Ready")["status"] == "True"


async def test_a_name_that_is_taken_between_look_and_write_stays_whose_it_is() -> None:
    world = World()
    foo = world.add("foo", replicas=2)
    for _ in range(3):
        await world.reconcile(foo)
    world.kube.remove("Service", "team", "foo-1")
    foreign = {"metadata": {"name": "foo-1", "namespace": "team"}, "spec": {"ports": [{"port": 1}]}}

    def take(verb: str, kind: str, name: str) -> None:
        if (kind, name) == ("Service", "foo-1") and (kind, "team", name) not in world.kube.objects:
            world.kube.put("Service", foreign)

    world.kube.before_write = take
    for _ in range(3):
        await world.reconcile(foo)
        world.time += 1
    assert world.kube.objects["Service", "team", "foo-1"]["spec"] == {"ports": [{"port": 1}]}
    assert world.condition(foo, "Stalled")["reason"] == "NameConflict"


async def test_requests_give_way_to_limits_and_to_the_namespaces_ranges() -> None:
    world = World()
    limits = {"limits": [{"type": "Container", "max": {"memory": "256Mi"}, "default": {"cpu": "100m"}}]}
    world.kube.put("LimitRange", {"metadata": {"name": "small", "namespace": "team"}, "spec": limits})
    container = {"name": "lockstep", "resources": {"limits": {"memory": "200Mi"}}}
    keys = [world.add(), world.add("tight", template={"spec": {"containers": [container]}})]
    await world.settle(*keys)
    asked = [
        world.kube.objects["StatefulSet", "team", f"{name}-0"]["spec"]["template"]["spec"]["containers"][0]["resources"]
        for name in ("chat", "tight")
    ]
    assert [one["requests"] for one in asked] == [
        {"cpu": "100m", "memory": "256Mi"}, {"cpu": "100m", "memory": "200Mi"},
    ]  # fmt: skip
    assert all(world.condition(key, "Ready")["status"] == "True" for key in keys)
    pods = {pod["metadata"]["uid"] for pod in world.kube.of_kind("Pod")}
    world.kube.remove("LimitRange", "team", "small")
    await world.settle(*keys)
    assert {pod["metadata"]["uid"] for pod in world.kube.of_kind("Pod")} == pods, "nobody is replaced for it"


async def test_both_ways_of_asking_restart_the_groups_in_turn() -> None:
    world, key = await serving()

    async def restarted(ask: object) -> None:
        before = {pod["metadata"]["uid"] for pod in world.kube.of_kind("Pod")}
        assert callable(ask)
        ask()
        fewest = 2
        for _ in range(60):
            await world.reconcile(key)
            for step in world.kube.steps(world.broken)[:1]:
                step()
            world.time += 1
            fewest = min(fewest, world.serving(key))
        await world.settle(key)
        assert not before & {pod["metadata"]["uid"] for pod in world.kube.of_kind("Pod")}
        assert fewest == 1, "one group at a time"
        writes = len(world.kube.writes)
        world.operators = [world.operator()]
        await world.reconcile(key)
        assert world.kube.writes[writes:] == []

    annotate = {"lockstep.dev/restartedAt": "2027-01-15T08:00:00Z"}
    await restarted(
        lambda: world.kube.change(KIND, "team", "chat", lambda live: live["metadata"].update(annotations=annotate))
    )
    kubectls = {"kubectl.kubernetes.io/restartedAt": "2027-01-15T10:00:00+01:00"}
    await restarted(
        lambda: world.kube.change(
            "StatefulSet", "team", "chat-1",
            lambda live: live["spec"]["template"]["metadata"].setdefault("annotations", {}).update(kubectls),
        )
    )  # fmt: skip
    world.kube.change(KIND, "team", "chat", lambda live: live["metadata"]["annotations"].update(
        {"lockstep.dev/restartedAt": "soon"}))  # fmt: skip
    await live(world, key, 15.0)
    assert "lockstep.dev/restartedAt must be a time" in world.condition(key, "Stalled")["message"]
