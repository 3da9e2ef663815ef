"""The objects that a model asks for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import yaml
from tests.support.chart import CRD_SOURCE
from tests.support.kube_fake import resource
from tests.support.operator_models import SETTINGS, model, revision_of

from lockstep_operator.decisions import manifests
from lockstep_operator.decisions.pod_template import pod_template, rendered
from lockstep_operator.types.model_source import Claim, EmptyDir, HuggingFace, Image
from lockstep_operator.types.names import ModelKey, key_of_child
from lockstep_operator.types.spec import Model, parse
from lockstep_operator.types.spec_blocks import EngineLimits, Network, RecoverySpec, Rollout, Watchdog
from lockstep_operator.types.spec_values import SecretKey, SpecError


def container(made: Model) -> dict[str, Any]:
    template = pod_template(made, 1, "abc", SETTINGS)
    found: dict[str, Any] = template["spec"]["containers"][0]
    return found


def environment(made: Model) -> dict[str, Any]:
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container(made)["env"]}


def test_a_spec_is_parsed_with_the_defaults_that_the_crd_names() -> None:
    live = resource()
    live["metadata"] |= {"uid": "u", "generation": 2}
    parsed = parse(live)
    assert (parsed.served_name, parsed.ranks_per_pod, parsed.replicas, parsed.dtype, parsed.rollout) == (
        "chat",
        1,
        1,
        "auto",
        Rollout(),
    )
    assert (parsed.pods_per_group, parsed.ranks, parsed.cache, parsed.engine) == (2, 2, EmptyDir(), EngineLimits())


def test_watchdog_and_recovery_are_parsed_with_the_defaults_that_the_crd_names() -> None:
    def parsed(**spec: Any) -> Model:
        live = resource(**spec)
        live["metadata"] |= {"uid": "u"}
        return parse(live)

    plain = parsed()
    assert (plain.watchdog, plain.recovery) == (Watchdog(), RecoverySpec())
    budget, backoff = {"attempts": 5, "window": "1h30m"}, {"initial": "500ms", "max": "2m"}
    recovery = {
        "mode": "Observe",
        "strategy": "RecyclePods",
        "weightCache": "Off",
        "budget": budget,
        "backoff": backoff,
    }
    made = parsed(recovery=recovery, watchdog={"stepTimeout": "2m", "floor": "1.5s", "factor": 3})
    assert made.watchdog == Watchdog(step_timeout=120.0, floor=1.5, factor=3)
    assert made.recovery == RecoverySpec(
        strategy="RecyclePods", observe=True, weight_cache="Off", attempts=5, window=5400.0, initial=0.5, most=120.0
    )
    assert parsed(recovery={"backoff": {"initial": "20m"}}).recovery.most == 1200.0, "never shorter than the first"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"watchdog": {"floor": "soon"}}, "floor: 'soon' is no duration such as 120s"),
        ({"tensorParallelSize": 4, "ranksPerPod": 3}, r"ranksPerPod \(3\) must divide tensorParallelSize \(4\)"),
        ({"model": {}}, "exactly one of huggingFace"),
        ({"model": {"hostPath": {"path": "/a"}, "huggingFace": {"repo": "a/b"}}}, "exactly one of huggingFace"),
    ],
)
def test_a_spec_that_can_not_be_served_says_what_to_change(spec: dict[str, Any], words: str) -> None:
    live = resource(**spec)
    live["metadata"] |= {"uid": "u"}
    with pytest.raises(SpecError, match=words):
        parse(live)


def test_the_arguments_are_the_runtimes_flags() -> None:
    made = model(engine=EngineLimits(max_model_len=4096, kv_cache_memory="2Gi"), dtype="bfloat16")
    assert container(made)["args"] == [
        "serve", "/model", "--tensor-parallel-size=2", "--ranks-per-pod=1", "--served-name=chat", "--dtype=bfloat16",
        "--backend=cpu", "--device=cpu", "--max-model-len=4096", "--kv-cache-memory=2Gi", "--lame-duck-seconds=3.0",
        "--grace-seconds=52.0", "--host=::", "--bus-port=7400", "--status-port=7401",
    ]  # fmt: skip


def test_a_shorter_grace_of_the_pod_shortens_that_of_requests() -> None:
    made = model(template={"spec": {"terminationGracePeriodSeconds": 8}})
    assert {"--lame-duck-seconds=2.0", "--grace-seconds=1.0"} <= set(container(made)["args"])


@pytest.mark.parametrize(
    ("cpu", "ranks_per_pod", "threads"), [("250m", 1, "1"), ("1500m", 1, "2"), (2, 2, "1"), ("8", 2, "4")]
)
def test_a_rank_on_cpus_has_as_many_threads_as_cpus(cpu: str | int, ranks_per_pod: int, threads: str) -> None:
    asked: dict[str, Any] = {"name": "lockstep", "resources": {"requests": {"cpu": cpu}}}
    made = model(ranks_per_pod=ranks_per_pod, template={"spec": {"containers": [asked]}})
    assert environment(made)["LOCKSTEP_THREADS_PER_RANK"] == threads


@pytest.mark.parametrize("backend", ["auto", "nccl"])
def test_a_model_with_an_accelerator_is_never_left_to_find_out(backend: str) -> None:
    """What a pod's driver says may differ from pod to pod."""
    arguments = set(container(model(accelerator="nvidia.com/gpu", backend=backend))["args"])
    assert {"--backend=nccl", "--device=cuda"} <= arguments


def test_a_rank_on_a_gpu_asks_for_two_cpus_and_takes_few_threads() -> None:
    made = model(accelerator="nvidia.com/gpu", tensor_parallel_size=8, ranks_per_pod=4)
    assert container(made)["resources"]["requests"]["cpu"] == "8000m"
    assert environment(made)["LOCKSTEP_THREADS_PER_RANK"] == "4"


def test_threads_are_left_alone_where_somebody_chose_them() -> None:
    chosen = {"name": "lockstep", "env": [{"name": "LOCKSTEP_THREADS_PER_RANK", "value": "7"}]}
    assert environment(model(template={"spec": {"containers": [chosen]}}))["LOCKSTEP_THREADS_PER_RANK"] == "7"


@pytest.mark.parametrize(
    ("source", "location", "volume"),
    [
        (
            Claim("models"),
            "/model",
            {"name": "model", "persistentVolumeClaim": {"claimName": "models", "readOnly": True}},
        ),
        (
            Claim("models", "a/b"),
            "/model/a/b",
            {"name": "model", "persistentVolumeClaim": {"claimName": "models", "readOnly": True}},
        ),
        (
            Image("registry.example/qwen:1"),
            "/model",
            {"name": "model", "image": {"reference": "registry.example/qwen:1"}},
        ),
        (
            Image("registry.example/qwen:1", "Never", "a/b"),
            "/model/a/b",
            {"name": "model", "image": {"reference": "registry.example/qwen:1", "pullPolicy": "Never"}},
        ),
        (HuggingFace(repo="Qwen/Qwen3-8B", revision="main"), "Qwen/Qwen3-8B", {"name": "cache", "emptyDir": {}}),
    ],
)
def test_sources(source: Claim | HuggingFace | Image, location: str, volume: dict[str, Any]) -> None:
    template = pod_template(model(source=source), 0, "abc", SETTINGS)
    assert template["spec"]["containers"][0]["args"][1] == location
    assert template["spec"]["volumes"][3] == volume


def test_a_hub_model_knows_its_revision_cache_and_token() -> None:
    hub = HuggingFace(repo="a/b", revision="v1", token=SecretKey("hub", "key"))
    made = model(source=hub, cache=Claim("cache"))
    source = "--source=name=huggingface,token-file=/etc/lockstep/hub-token/token,default"
    assert {"--revision=v1", "--download-dir=/cache", source} <= set(container(made)["args"])
    assert "HF_TOKEN" not in environment(made)
    secret = {"secretName": "hub", "items": [{"key": "key", "path": "token"}]}
    assert {"name": "hub-token", "secret": secret} in pod_template(made, 0, "a", SETTINGS)["spec"]["volumes"]
    mount = {"name": "hub-token", "mountPath": "/etc/lockstep/hub-token", "readOnly": True}
    assert mount in container(made)["volumeMounts"]
    assert pod_template(made, 0, "a", SETTINGS)["spec"]["securityContext"]["fsGroup"] == 65532


def test_identity_and_secrets_come_by_the_environment() -> None:
    found = environment(model(api_key=SecretKey("api", "key")))
    assert found["LOCKSTEP_GROUP"] == "1"
    assert found["LOCKSTEP_LEADER"] == "chat-1-0.chat-1.team.svc"
    assert found["LOCKSTEP_SPEC_REVISION"] == "abc"
    assert found["LOCKSTEP_TOKEN"] == {"secretKeyRef": {"name": f"chat-token-{model().tokens_id}", "key": "token"}}
    assert found["LOCKSTEP_POD_INDEX"] == {"fieldRef": {"fieldPath": "metadata.labels['apps.kubernetes.io/pod-index']"}}


def test_pods_keep_to_the_restricted_profile() -> None:
    spec = pod_template(model(), 0, "abc", SETTINGS)["spec"]
    assert spec["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    assert (spec["automountServiceAccountToken"], spec["enableServiceLinks"]) == (False, False)
    assert spec["containers"][0]["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip


def test_an_accelerator_is_asked_for_once_per_rank_of_the_pod() -> None:
    made = model(accelerator="nvidia.com/gpu", tensor_parallel_size=8, ranks_per_pod=4)
    assert container(made)["resources"]["limits"] == {"nvidia.com/gpu": "4"}


def test_the_users_template_can_not_move_pods_out_of_the_selectors_reach() -> None:
    made = model(
        template={"metadata": {"labels": {"lockstep.dev/model": "x", "team": "blue"}, "annotations": {"a": "b"}}}
    )
    metadata = pod_template(made, 0, "abc", SETTINGS)["metadata"]
    assert (metadata["labels"]["lockstep.dev/model"], metadata["labels"]["team"]) == ("chat", "blue")
    assert metadata["annotations"] == {"a": "b"}


def terms(made: Model, *avoid: str) -> list[dict[str, Any]]:
    affinity = pod_template(made, 0, "abc", SETTINGS, avoid)["spec"]["affinity"]
    found: list[dict[str, Any]] = affinity["nodeAffinity"][REQUIRED]["nodeSelectorTerms"]
    return found


REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"


def test_pods_are_kept_away_from_nodes_in_every_alternative_that_the_user_gives() -> None:
    away = [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in ("n1", "n2")]
    assert terms(model(), "n2", "n1") == [{"matchFields": away}]
    zones = [{"matchExpressions": [{"key": "zone", "operator": "In", "values": [zone]}]} for zone in "ab"]
    pods: dict[str, Any] = {"requiredDuringSchedulingIgnoredDuringExecution": []}
    template = {"spec": {"affinity": {"podAffinity": pods, "nodeAffinity": {REQUIRED: {"nodeSelectorTerms": zones}}}}}
    made = model(template=template)
    assert terms(made, "n1", "n2") == [zone | {"matchFields": away} for zone in zones]
    assert pod_template(made, 0, "abc", SETTINGS, ["n1"])["spec"]["affinity"]["podAffinity"] == pods
    assert "affinity" not in pod_template(model(), 0, "abc", SETTINGS)["spec"]


def test_the_serving_service_leads_to_the_first_pods_only() -> None:
    service = manifests.serving_service(model())
    assert service["metadata"]["name"] == "chat"
    assert service["spec"]["selector"] == {"lockstep.dev/model": "chat", "apps.kubernetes.io/pod-index": "0"}


def test_services_have_both_ip_families_where_the_cluster_has_both() -> None:
    for service in (manifests.serving_service(model()), manifests.headless_service(model(), 0)):
        assert service["spec"]["ipFamilyPolicy"] == "PreferDualStack"
        assert "ipFamilies" not in service["spec"], "the cluster's first one stays the first"


OWN_NAMESPACE: dict[str, Any] = {"podSelector": {}}
GATEWAY = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "gateway"}}}
PROMETHEUS = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
OFFICE = {"ipBlock": {"cidr": "10.0.0.0/8"}}


def ingress(made: Model, **settings: Any) -> list[dict[str, Any]]:
    spec = manifests.network_policy(made, 0, replace(SETTINGS, **settings))["spec"]
    assert spec["policyTypes"] == ["Ingress"]
    found: list[dict[str, Any]] = spec["ingress"]
    assert all(rule["from"] for rule in found), "an empty list lets in everybody"
    return found


def clients(made: Model, **settings: Any) -> list[dict[str, Any]]:
    """Who may reach the API."""
    ports = [{"port": 8000, "protocol": "TCP"}]
    return [peer for rule in ingress(made, **settings) if rule.get("ports") == ports for peer in rule["from"]]


def test_the_network_policy_lets_only_members_and_the_operator_to_the_rank_ports() -> None:
    members, _, operator = ingress(model())
    assert members == {
        "from": [{"podSelector": {"matchLabels": {"lockstep.dev/model": "chat", "lockstep.dev/group": "0"}}}]
    }
    assert operator["ports"] == [{"port": 7401, "protocol": "TCP"}]
    assert operator["from"][0]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "lockstep-system"}
    assert len(ingress(model(), operator_namespace=None)) == 2


def test_the_api_is_for_the_models_namespace_and_whom_the_installation_names() -> None:
    assert clients(model()) == [OWN_NAMESPACE]
    assert clients(model(), api_from=(GATEWAY,), scrape_from=(PROMETHEUS,)) == [OWN_NAMESPACE, GATEWAY, PROMETHEUS]


def test_the_user_says_instead_who_may_use_the_api_but_not_who_scrapes() -> None:
    made = model(network=Network(peers=(OFFICE,)))
    assert clients(made, api_from=(GATEWAY,)) == [OFFICE]
    assert clients(made, api_from=(GATEWAY,), scrape_from=(PROMETHEUS,)) == [OFFICE, PROMETHEUS]
    assert clients(model(network=Network(peers=())), api_from=(GATEWAY,)) == []


@pytest.mark.parametrize(
    ("policy", "setting", "made"),
    [(None, "Managed", True), (None, "None", False), ("None", "Managed", False), ("Managed", "None", True)],
)
def test_the_network_policy_can_be_left_to_others(policy: str | None, setting: str, made: bool) -> None:
    beside = manifests.of_group(model(network=Network(policy=policy)), 0, replace(SETTINGS, network_policy=setting))
    assert ("NetworkPolicy" in [manifest["kind"] for manifest in beside]) is made


def test_who_may_use_the_api_is_parsed_and_replaces_no_pod() -> None:
    live = resource(network={"policy": "Managed", "from": [OFFICE]})
    live["metadata"] |= {"uid": "u"}
    assert parse(live).network == Network("Managed", (OFFICE,))
    revision = revision_of(model())
    assert revision_of(model(network=Network("None"))) == revision


def test_the_api_keys_are_a_file_which_changes_with_the_secret() -> None:
    made = model(api_key=SecretKey("api", "key"))
    spec = pod_template(made, 0, "abc", SETTINGS)["spec"]
    volume = next(volume for volume in spec["volumes"] if volume["name"] == "api-key")
    mount = next(mount for mount in spec["containers"][0]["volumeMounts"] if mount["name"] == "api-key")
    (item,) = volume["secret"]["items"]
    assert (volume["secret"]["secretName"], item["key"]) == ("api", "key")
    assert environment(made)["LOCKSTEP_API_KEY_FILE"] == f"{mount['mountPath']}/{item['path']}"
    assert "subPath" not in mount, "the kubelet never changes such a mount"


NOT_READY, UNREACHABLE = "node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ([], {NOT_READY: 30, UNREACHABLE: 30}),
        ([{"key": "nvidia.com/gpu", "operator": "Exists"}], {NOT_READY: 30, UNREACHABLE: 30}),
        ([{"operator": "Exists", "effect": "NoSchedule"}], {NOT_READY: 30, UNREACHABLE: 30}),
        ([{"operator": "Exists"}], {}),
        (
            [{"key": NOT_READY, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 900}],
            {NOT_READY: 900, UNREACHABLE: 30},
        ),
    ],
)
def test_pods_leave_a_node_that_is_not_heard_from_soon_unless_the_user_says_otherwise(
    given: list[dict[str, Any]], seconds: dict[str, int]
) -> None:
    spec = pod_template(model(template={"spec": {"tolerations": given}}), 0, "abc", SETTINGS)["spec"]
    assert spec["tolerations"][: len(given)] == given
    told = {one["key"]: one["tolerationSeconds"] for one in spec["tolerations"] if "tolerationSeconds" in one}
    assert told == seconds


def test_what_the_installation_says_of_images_and_users_reaches_the_pods() -> None:
    made = model(source=HuggingFace(repo="a/b"), cache=Claim("cache"))
    template = {"spec": {"imagePullSecrets": [{"name": "mine"}]}}
    settings = replace(
        SETTINGS, pull_secrets=("pull",), fs_group=None, log_format="json", tracing_endpoint="http://c:4318"
    )
    assert "fsGroup" not in pod_template(made, 0, "a", settings)["spec"]["securityContext"]
    spec = pod_template(replace(made, template=template), 0, "a", settings)["spec"]
    assert spec["imagePullSecrets"] == [{"name": "pull"}, {"name": "mine"}]
    assert {"name": "LOCKSTEP_LOG_FORMAT", "value": "json"} in spec["containers"][0]["env"]
    assert {"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": "http://c:4318"} in spec["containers"][0]["env"]
    assert "imagePullSecrets" not in pod_template(made, 0, "a", SETTINGS)["spec"]


def test_everything_is_owned_by_the_model_and_says_to_whom_it_belongs() -> None:
    made = model()
    every = [
        *manifests.shared(made), *manifests.of_group(made, 0, SETTINGS), manifests.group_token(made, "t"),
        manifests.operator_token(made, "t"), manifests.stateful_set(made, 0, "abc", rendered(made, SETTINGS)),
    ]  # fmt: skip
    for manifest in every:
        owner = manifest["metadata"]["ownerReferences"][0]
        assert (owner["uid"], owner["controller"]) == ("uid-m", True)
        assert key_of_child(manifest) == made.key


CRD = yaml.safe_load(CRD_SOURCE.read_text())
SPEC = CRD["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]


def test_the_longest_names_that_the_crd_admits_fit() -> None:
    """Labels and host names of 63 characters, DNS names of 253; pods carry the StatefulSet's name and a hash of ten."""
    most_groups, most_pods = SPEC["replicas"]["maximum"], SPEC["tensorParallelSize"]["maximum"]
    made = model(key=ModelKey("n" * 63, "m" * 40), replicas=most_groups, tensor_parallel_size=most_pods)
    group = most_groups - 1
    workload = manifests.stateful_set(made, group, "0123456789", rendered(made, SETTINGS))
    every = [
        *manifests.shared(made),
        *manifests.of_group(made, group, SETTINGS),
        manifests.group_token(made, "t"),
        manifests.operator_token(made, "t"),
        workload,
    ]
    pod = f"{workload['metadata']['name']}-{workload['spec']['replicas'] - 1}"
    labels = [value for one in every for value in one["metadata"]["labels"].values()]
    short = [
        *(one["metadata"]["name"] for one in every),
        pod,
        f"{workload['metadata']['name']}-0123456789",
        *labels,
    ]
    assert max(len(name) for name in short) <= 63
    leader = next(
        one for one in workload["spec"]["template"]["spec"]["containers"][0]["env"] if one["name"] == "LOCKSTEP_LEADER"
    )
    assert len(leader["value"]) + len(".cluster.local") <= 253


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float32"}, {"tensor_parallel_size": 4}, {"engine": EngineLimits(max_sequences=2)},
        {"template": {"spec": {"priorityClassName": "high"}}}, {"source": Claim("other")},
        {"watchdog": Watchdog(floor=3.0)}, {"recovery": RecoverySpec(strategy="RecyclePods")},
    ],
)  # fmt: skip
def test_what_shapes_pods_makes_a_new_revision(change: dict[str, Any]) -> None:
    assert revision_of(model(**change)) != revision_of(model())


def test_new_tokens_or_another_image_make_a_new_revision_and_a_new_size_does_not() -> None:
    revision = revision_of(model())
    assert revision_of(model(new_tokens_at=1_790_000_000.0)) != revision
    assert revision_of(model(uid="uid-of-another")) != revision, "a model of the same name has other tokens"
    assert revision_of(model(), replace(SETTINGS, runtime_image="runtime:2")) != revision
    other = model(replicas=5, rollout=Rollout(max_surge=2), generation=9)
    assert revision_of(other) == revision
    patient = RecoverySpec(observe=True, attempts=9, window=1.0, initial=1.0, most=2.0)
    assert revision_of(model(recovery=patient)) == revision, "only the operator reads these"
