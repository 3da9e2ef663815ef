"""Who may do what with models: the roles that the chart adds to the cluster's own, and its admission policy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import pytest
import yaml
from tests.support import kubectl
from tests.support.chart import one, render
from tests.support.chart_place import ChartPlace
from tests.support.cluster_model import Object, manifest
from tests.support.second_api_server import second_api_server
from tests.support.wait import until

HUB: Final[Object] = {"huggingFace": {"repo": "Qwen/Qwen3-8B"}}
POLICY_SECONDS: Final = 30.0  # until the API server has noticed a policy


# --- roles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "allowed", "refused"),
    [
        ("view", ["get tpm", "list tpm", "watch tpm"], ["create tpm", "patch tpm", "delete tpm", "update tpm/scale"]),
        ("edit", ["get tpm", "create tpm", "patch tpm", "delete tpm", "patch tpm/scale"], ["patch tpm/status"]),
        ("admin", ["get tpm", "create tpm", "delete tpm", "update tpm/scale"], ["patch tpm/status"]),
    ],
)
def test_the_clusters_own_roles_have_models(namespace: str, role: str, allowed: list[str], refused: list[str]) -> None:
    user = f"tenant-{namespace}"
    kubectl.kubectl("-n", namespace, "create", "rolebinding", "tenant", f"--clusterrole={role}", f"--user={user}")

    def may(what: str, where: str = namespace) -> bool:
        verb, resource = what.split()
        name, _, subresource = resource.partition("/")
        options = (f"--subresource={subresource}",) if subresource else ()
        answer = kubectl.attempt("auth", "can-i", verb, name, *options, "-n", where, f"--as={user}")
        assert answer.stdout.strip() in {"yes", "no"}, answer.stderr
        return answer.stdout.strip() == "yes"

    until("the binding to count", lambda: may(allowed[0]), 15)
    assert [what for what in allowed if not may(what)] == []
    assert [what for what in refused if may(what)] == []
    assert not may("get tpm", "default"), "in other namespaces"


# --- admission policy ------------------------------------------------------------------------------------------------


def model(source: Object = HUB, pod: Object | None = None) -> Object:
    spec: Object = {"model": source, "tensorParallelSize": 2}
    return spec | ({"template": {"spec": pod}} if pod is not None else {})


def container(**fields: Any) -> Object:
    return {"containers": [{"name": "lockstep", **fields}]}


def init(**fields: Any) -> Object:
    return {"initContainers": [{"name": "first", "image": "registry.example/team/first:1", **fields}]}


OURS: Final = "registry.example/team/model:1"
# Switch of the chart -> a part of its sentence, what it refuses, what it takes.
RULES: Final[dict[str, tuple[Any, str, list[Object], list[Object]]]] = {
    "forbidHostPath": (
        True,
        "folders of the node are forbidden here; use a PersistentVolumeClaim or a model's image instead of hostPath",
        [
            model({"hostPath": {"path": "/models"}}),
            model(HUB | {"cache": {"hostPath": {"path": "/cache"}}}),
            model(pod={"volumes": [{"name": "a", "emptyDir": {}}, {"name": "b", "hostPath": {"path": "/"}}]}),
        ],
        [
            model(),
            model({"persistentVolumeClaim": {"claimName": "models"}}),
            model(HUB | {"cache": {"emptyDir": {}}}),
            model(pod={"volumes": [{"name": "a", "emptyDir": {}}]}),
        ],
    ),
    "forbidHostNamespaces": (
        True,
        "the node's namespaces are forbidden here; remove hostNetwork, hostPID, hostIPC and hostPort",
        [
            model(pod={"hostNetwork": True}),
            model(pod={"hostPID": True}),
            model(pod={"hostIPC": True}),
            model(pod=container(ports=[{"containerPort": 9, "hostPort": 9}])),
        ],
        [model(pod={"hostNetwork": False}), model(pod=container(ports=[{"containerPort": 9}]))],
    ),
    "forbidPrivileged": (
        True,
        "privileged containers are forbidden here; remove privileged, and capabilities but IPC_LOCK",
        [
            model(pod=container(securityContext={"privileged": True})),
            model(pod=init(securityContext={"privileged": True})),
            model(pod=container(securityContext={"capabilities": {"add": ["IPC_LOCK", "SYS_ADMIN"]}})),
        ],
        [
            model(pod=container(securityContext={"privileged": False})),
            model(pod=container(securityContext={"capabilities": {"add": ["IPC_LOCK"]}})),
            model(pod=init(securityContext={"runAsUser": 7})),
        ],
    ),
    "forbidServiceAccounts": (
        True,
        "other ServiceAccounts are forbidden here; remove serviceAccountName from spec.template",
        [model(pod={"serviceAccountName": "admin"}), model(pod={"serviceAccount": "admin"})],
        [model(pod={"nodeSelector": {"pool": "gpu"}})],
    ),
    "imagePrefixes": (
        ["registry.example/team/", "mirror.example/"],
        "images must come from registry.example/team/, mirror.example/",
        [
            model(pod=container(image="registry.example/other:1")),
            model(pod=init(image="busybox")),
            model({"image": {"reference": "registry.example.evil.example/team/m:1"}}),
            model(pod={"volumes": [{"name": "a", "image": {"reference": "docker.io/x:1"}}]}),
        ],
        [
            model(pod=container(image="registry.example/team/runtime:1")),
            model(pod=init()),
            model({"image": {"reference": "mirror.example/m:1"}}),
            model(pod={"volumes": [{"name": "a", "image": {"reference": OURS}}]}),
        ],
    ),
}
ALL_ON: Final[Object] = {switch: value for switch, (value, *_) in RULES.items()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChartPlace]:
    """With a namespace that is another team's."""
    with second_api_server(tmp_path_factory.mktemp("tenants")) as kubeconfig:
        place = ChartPlace(kubeconfig)
        place.kubectl("create", "namespace", "free")
        place.must("install")
        place.until_served("v1beta1")
        yield place


def said(place: ChartPlace, specs: list[Object], namespace: str = "default") -> list[str]:
    """What the API server says to each of these: empty to what it takes."""
    documents = yaml.safe_dump_all(manifest(namespace, f"m-{number}", spec) for number, spec in enumerate(specs))
    command = (f"--kubeconfig={place.kubeconfig}", "apply", "--dry-run=server", "-f", "-")
    refusals = kubectl.attempt(*command, stdin=documents).stderr.split(kubectl.REFUSED)[1:]
    answers = [""] * len(specs)
    for refusal in refusals:
        named = re.search(r'"m-(\d+)" is forbidden: ValidatingAdmissionPolicy', refusal)
        assert named, refusal
        answers[int(named[1])] = refusal
    return answers


def switch(place: ChartPlace, policy: Object, *, probe: Object, namespace: str, refused: bool) -> None:
    """The release with this policy, from when it counts: when `probe` is refused, or taken."""
    place.must("upgrade", values={"admissionPolicy": policy})
    until(
        "the API server to follow the policy",
        lambda: bool(said(place, [probe], namespace)[0]) == refused,
        POLICY_SECONDS,
    )


def test_each_switch_refuses_with_its_sentence_and_takes_the_rest(place: ChartPlace) -> None:
    refused = [(sentence, spec) for _, sentence, specs, _ in RULES.values() for spec in specs]
    taken = [spec for _, _, _, specs in RULES.values() for spec in specs]
    assert said(place, [spec for _, spec in refused]) == [""] * len(refused), "off by default"

    switch(place, ALL_ON, probe=refused[0][1], namespace="default", refused=True)
    answers = said(place, [spec for _, spec in refused])
    wrong = [pair for pair in zip(refused, answers, strict=True) if pair[0][0] not in pair[1]]
    assert wrong == []
    assert said(place, taken) == [""] * len(taken)

    place.kubectl("label", "namespace", "free", "team=free")
    elsewhere = {"matchExpressions": [{"key": "team", "operator": "NotIn", "values": ["free"]}]}
    switch(place, ALL_ON | {"namespaceSelector": elsewhere}, probe=refused[0][1], namespace="free", refused=False)
    assert said(place, [refused[0][1]], "default") != [""], "everywhere else"

    switch(place, {}, probe=refused[0][1], namespace="default", refused=False)
    assert said(place, [spec for _, spec in refused]) == [""] * len(refused)


def test_the_rules_fit_the_schema_of_the_cluster(namespace: str) -> None:
    """Kubernetes checks the types of a policy's expressions against the CRD. Without a binding it refuses nothing."""
    policy = one(render({"admissionPolicy": ALL_ON}, "--kube-version", "1.30.0"), "ValidatingAdmissionPolicy")
    policy["metadata"] = {"name": namespace}
    kubectl.apply(policy)
    try:
        look = ("validatingadmissionpolicy", namespace)
        until("the types to be checked", lambda: "observedGeneration" in kubectl.get(*look).get("status", {}), 30)
        assert kubectl.get(*look)["status"].get("typeChecking", {}) == {}
    finally:
        kubectl.kubectl("delete", "validatingadmissionpolicy", namespace)


def test_what_no_rule_can_read_is_refused(place: ChartPlace) -> None:
    """A template is free in form: what hides from the rules by its form does not get past them."""
    probe = model({"hostPath": {"path": "/models"}})
    hidden = [model(pod={"containers": None, "hostPID": True}), model(pod={"volumes": {"a": {"hostPath": {}}}})]
    switch(place, ALL_ON, probe=probe, namespace="default", refused=True)
    assert all(said(place, hidden))
