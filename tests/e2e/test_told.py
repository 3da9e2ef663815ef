"""What keeps a model from being as asked is told within 15 s, truly at every moment, and holds up nothing else."""

from __future__ import annotations

import shutil
import time
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import pytest
from tests.support import kubectl
from tests.support.cluster_api import ClusterApi
from tests.support.cluster_faults import events
from tests.support.cluster_lifecycle import change_spec, uids
from tests.support.cluster_model import OPERATOR_NAMESPACE, OPERATOR_SELECTOR, RESOURCES, Model, Object, tiny_chat
from tests.support.cluster_processes import kill, one_process
from tests.support.local_operator import deployed_settings
from tests.support.status_watch import StatusWatch, watched

TOLD_SECONDS: Final = 15.0
HEALED_SECONDS: Final = 90.0
EXAMPLE: Final = Path(__file__).parents[2] / "examples" / "tiny-chat"
CONTAINER: Final[Object] = {"name": "lockstep", "resources": RESOURCES}
HEALS: Final[Object] = {"strategy": "RecyclePods", "backoff": {"initial": "1s"}}


def small(**spec: Any) -> Object:
    """A model in one pod, whose operator replaces pods."""
    return tiny_chat(**({"ranksPerPod": 2, "recovery": HEALS} | spec))


def healed_meanwhile(model: Model, group: int) -> None:
    """Kill a rank of the group, which then gives up by its strategy: the operator replaces its pod and it serves."""
    before = model.pod(group, 0)
    recoveries = model.status().get("recoveries", 0)
    kill(one_process(before, f"lockstep: worker model={model.name} group={group} rank=0"))
    model.until("the repair", lambda: model.status().get("recoveries", 0) > recoveries, HEALED_SECONDS)
    assert model.pod(group, 0)["metadata"]["uid"] != before["metadata"]["uid"]


def told(model: Model, kind: str, reason: str, words: str) -> None:
    def look() -> bool:
        found = model.condition(kind)
        return bool(found.get("reason") == reason and found["status"] == "True" and words in found["message"])

    model.until(f"{kind}={reason}", look, TOLD_SECONDS)


def test_a_typo_in_the_template_is_told_and_the_groups_are_healed_meanwhile(api: ClusterApi, namespace: str) -> None:
    model = Model(api, namespace, "typo")
    model.apply(small(replicas=2))
    model.until_serving(2)
    before = uids(model)
    change_spec(model, '{"spec": {"template": {"spec": {"nodeSelectr": {"a": "b"}}}}}')
    told(model, "Stalled", "Refused", ".spec.template.spec.nodeSelectr: field not declared in schema")
    assert model.status()["observedGeneration"] == model.read()["metadata"]["generation"]
    assert [event["type"] for event in events(model).values() if event["reason"] == "Refused"] == ["Warning"]
    assert model.is_true("Available")
    assert uids(model) == before

    healed_meanwhile(model, 0)
    healed_meanwhile(model, 1)
    assert model.condition("Stalled")["reason"] == "Refused"

    change_spec(model, '{"spec": {"template": {"spec": {"nodeSelectr": null}}}}')
    model.until_serving(2)


def test_templates_of_no_shape_are_told_with_the_field(api: ClusterApi, namespace: str) -> None:
    model = Model(api, namespace, "shape")
    model.apply(small())
    model.until_ready()
    for field, words in (
        (
            '"terminationGracePeriodSeconds": "60s"',
            "template.spec.terminationGracePeriodSeconds: expected `int | null`, got `str`",
        ),
        ('"containers": {"lockstep": {}}', "template.spec.containers: expected `array`, got `object`"),
        ('"affinity": "x"', "template.spec.affinity: expected `object | null`, got `str`"),
    ):
        name = field.partition(":")[0]
        change_spec(model, f'{{"spec": {{"template": {{"spec": {{{field}}}}}}}}}')
        told(model, "Stalled", "InvalidSpec", words)
        assert model.is_true("Available")
        if name == '"containers"':
            model.apply(small())
        else:
            change_spec(model, f'{{"spec": {{"template": {{"spec": {{{name}: null}}}}}}}}')
        model.until_ready()


def test_files_that_can_not_be_used_are_told_in_their_own_words(api: ClusterApi, namespace: str, folder: Path) -> None:
    """The tokenizer by the leader, who alone reads it, and weights that may not be read by a rank."""
    garbled, closed = (_copied(api, namespace, folder / name) for name in ("garbled", "closed"))
    (folder / "garbled" / "tokenizer.json").write_text('{"model": {"type": "Unheard"}}')
    (folder / "closed" / "model.safetensors").chmod(0o600)
    for model in (garbled, closed):
        source = {"hostPath": {"path": str(folder / model.name)}}
        model.apply(small(tensorParallelSize=1, ranksPerPod=1, model=source))
    with watched(garbled) as first, watched(closed) as second:
        _loading_fails(garbled, "tokenizer.json can't be used")
        _loading_fails(closed, "may not read /model/model.safetensors; give it the right to")
        for seen in (first, second):
            assert len(seen.models()) > 1, "the watch works"
            for kind in ("Ready", "Available", "ModelLoaded"):
                assert all(condition["status"] == "False" for condition in seen.conditions(kind)), kind
            assert not any("about to take requests" in condition["message"] for condition in seen.conditions("Ready"))
        shutil.copy(EXAMPLE / "tokenizer.json", folder / "garbled")
        (folder / "closed" / "model.safetensors").chmod(0o644)
        garbled.until_ready()
        closed.until_ready()


def _copied(api: ClusterApi, namespace: str, folder: Path) -> Model:
    shutil.copytree(EXAMPLE, folder)
    return Model(api, namespace, folder.name)


def _loading_fails(model: Model, words: str) -> None:
    """In the pod's log first, and soon in the status; nobody but a person can mend it, so it is Stalled at once."""
    model.until("the pod to know", lambda: words in model.api.log(model.namespace, f"{model.name}-0-0"))
    told(model, "Stalled", "ModelLoadFailed", words)
    for kind in ("Ready", "ModelLoaded"):
        condition = model.condition(kind)
        assert condition["status"] == "False"
        assert words in condition["message"], condition


def test_what_keeps_clients_from_the_api_is_told(api: ClusterApi, namespace: str) -> None:
    """A Secret that lets nobody in, and a port that another container of the pod has taken."""
    keyless, ported = Model(api, namespace, "keyless"), Model(api, namespace, "ported")
    keyless.kubectl("create", "secret", "generic", "keys", "--from-literal=keys=\n")
    one_rank: Object = {"tensorParallelSize": 1, "ranksPerPod": 1, "recovery": {"mode": "Observe"}}
    keyless.apply(small(**one_rank, apiKeySecretRef={"name": "keys", "key": "keys"}))
    quick = {"terminationGracePeriodSeconds": 5, "containers": [CONTAINER]}  # the sidecar knows no SIGTERM
    ported.apply(small(**one_rank, template={"spec": quick | {"initContainers": [_taker(api)]}}))
    for model in (keyless, ported):
        model.until("its pod to run", lambda model=model: _runs(model))  # type: ignore[misc]
    told(keyless, "Stalled", "ModelLoadFailed", "holds no API key")
    told(ported, "Reconciling", "Starting", "can't listen on [::]:8000: Address already in use")
    for model in (keyless, ported):
        assert model.condition("ModelLoaded")["message"] == model.condition("Ready")["message"]


def _runs(model: Model) -> bool:
    return any(pod["status"].get("phase") == "Running" for pod in model.pods())


def _taker(api: ClusterApi) -> Object:
    """A sidecar that is there before our container, by an image that the node has."""
    (operator,) = api.items("deployments", OPERATOR_NAMESPACE, OPERATOR_SELECTOR)
    image = deployed_settings(operator)["LOCKSTEP_RUNTIME_IMAGE"]
    return {
        "name": "taker",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "restartPolicy": "Always",
        "command": ["python", "-m", "http.server", "8000"],
    }


def test_more_cpus_than_there_are_is_progress_until_its_deadline(api: ClusterApi, namespace: str) -> None:
    model = Model(api, namespace, "greedy")
    greedy = {"name": "lockstep", "resources": {"requests": {"cpu": "1000"}}}
    model.apply(small(progressDeadline="20s", template={"spec": {"containers": [greedy]}}))
    with watched(model) as seen:
        told(model, "Reconciling", "Unschedulable", "Insufficient cpu")
        model.until("the deadline", lambda: model.is_true("Stalled"), 40)
        stalled = model.condition("Stalled")
        assert stalled["reason"] == "ProgressDeadlineExceeded"
        assert "Insufficient cpu" in stalled["message"]
        _one_at_a_time(seen)
        change_spec(model, '{"spec": {"template": null}}')
        model.until_ready()
        assert not model.is_true("Stalled")


def test_a_group_without_room_stops_neither_service_nor_changes(api: ClusterApi, namespace: str) -> None:
    model = Model(api, namespace, "roomless")
    model.apply(small())
    model.until_ready()
    kubectl.kubectl("-n", namespace, "create", "quota", "one", "--hard=pods=1")
    change_spec(model, '{"spec": {"replicas": 2}}')
    told(model, "Reconciling", "PodsRefused", "exceeded quota")
    assert model.is_true("Available")
    healed_meanwhile(model, 0)
    kubectl.kubectl("-n", namespace, "delete", "quota", "one")
    model.until_serving(2)


def test_a_scheduling_gate_is_waited_for_and_never_stalls(api: ClusterApi, namespace: str) -> None:
    model = Model(api, namespace, "gated")
    container = {"name": "lockstep", "resources": RESOURCES}
    gated = {"schedulingGates": [{"name": "lockstep.dev/e2e"}], "containers": [container]}
    model.apply(small(progressDeadline="20s", template={"spec": gated}))
    with watched(model) as seen:
        told(model, "Reconciling", "SchedulingGated", "lockstep.dev/e2e")
        before = len(seen.models())
        model.until("the deadline to have passed", lambda: _waited(model, 22), 60)
        assert before, "the watch works"
        assert seen.never_stalled()
        model.kubectl("patch", "pod", f"{model.name}-0-0", "--type=json", "-p",
                      '[{"op": "remove", "path": "/spec/schedulingGates"}]')  # fmt: skip
        model.until_ready()
        assert seen.never_stalled()


def _waited(model: Model, seconds: float) -> bool:
    since = model.status()["groups"][0]["waiting"]["since"]
    return time.time() - datetime.fromisoformat(since).timestamp() > seconds


@pytest.mark.lasting  # the kubelet looks at what pods have written once in a while
def test_an_evicted_pod_is_replaced_and_nothing_stalls(api: ClusterApi, namespace: str) -> None:
    model = Model(api, namespace, "evicted")
    scratch = [{"name": "scratch", "emptyDir": {"sizeLimit": "8Mi"}}]
    mounts = [{"name": "scratch", "mountPath": "/scratch"}]
    container = {"name": "lockstep", "resources": RESOURCES, "volumeMounts": mounts}
    model.apply(small(replicas=2, template={"spec": {"volumes": scratch, "containers": [container]}}))
    model.until_serving(2)
    before = model.pod(0, 0)["metadata"]["uid"]
    with watched(model) as seen:
        fill = "head -c 33554432 /dev/zero > /scratch/full"
        model.kubectl("exec", f"{model.name}-0-0", "--", "sh", "-c", fill)
        model.until("the kubelet to evict", lambda: _uid(model) not in ("", before), 180)
        model.until_serving(2)
        assert seen.never_stalled()
        assert len(seen.models()) > 1, "the watch works"


def _uid(model: Model) -> str:
    found = model.api.find("pods", model.namespace, f"{model.name}-0-0")
    return str(found["metadata"]["uid"]) if found else ""


def test_both_ways_of_asking_restart_the_groups_in_turn(api: ClusterApi, namespace: str) -> None:
    model = Model(api, namespace, "restarted")
    model.apply(small(replicas=2))
    model.until_serving(2)
    for ask in (
        ["annotate", "--overwrite", "tpm", model.name, "lockstep.dev/restartedAt=2026-01-31T12:00:00Z"],
        ["rollout", "restart", "statefulset", f"{model.name}-1"],
    ):
        before = uids(model)
        with watched(model) as seen:
            model.kubectl(*ask)
            model.until("all pods to be new", lambda before=before: not before & uids(model), 240)  # type: ignore[misc]
            model.until_serving(2)
            assert all(condition["status"] == "True" for condition in seen.conditions("Available"))


def test_models_whose_names_collide_do_each_other_no_harm(api: ClusterApi, namespace: str) -> None:
    first, second = Model(api, namespace, "foo-1"), Model(api, namespace, "foo")
    first.apply(small())
    first.until_ready()
    second.apply(small(replicas=2))
    told(second, "Stalled", "NameConflict", "Service foo-1 exists and belongs to TensorParallelModel foo-1")
    second.until("its other group to serve", lambda: second.is_true("Available"))
    assert first.is_true("Ready")
    healed_meanwhile(second, 0)
    first.delete()
    second.until_serving(2)


def test_a_namespace_that_is_deleted_causes_no_warnings(api: ClusterApi, namespace: str) -> None:
    model = Model(api, namespace, "leaving")
    model.apply(small())
    model.until_ready()
    with watched(model) as seen:
        kubectl.kubectl("delete", "namespace", namespace, "--wait=false")
        model.until("nothing to be left", lambda: not api.items("pods", namespace), HEALED_SECONDS)
        assert seen.never_stalled()


def _one_at_a_time(seen: StatusWatch) -> None:
    """In every status either something moves or a person is waited for, unless all is well."""
    for model in seen.models():
        found = {one["type"]: one["status"] for one in model.get("status", {}).get("conditions", [])}
        if found.get("Ready") == "False":
            assert {found["Reconciling"], found["Stalled"]} == {"True", "False"}
