"""The operator's rank pods are what the runtime's command line expects, and satisfy the restricted profile."""

from __future__ import annotations

import re
from typing import Any

import click
import pytest
import yaml
from tests.support.chart import CRD_SOURCE
from tests.support.command_line import configuration
from tests.support.pod_security import violations

from lockstep_operator.decisions import manifests
from lockstep_operator.decisions.pod_template import pod_template, rendered
from lockstep_operator.settings import ModelSource, Settings
from lockstep_operator.types.durations import duration
from lockstep_operator.types.spec import parse
from lockstep_operator.types.spec_blocks import RecoverySpec
from lockstep_runtime.config import (
    API_KEY_FILE_VARIABLE,
    OPERATOR_TOKEN_FILE_VARIABLE,
    TOKEN_VARIABLE,
    EngineLimits,
    ServeConfig,
    Source,
    Vision,
    Watchdog,
)
from lockstep_runtime.protocol.status import API_PORT, BUS_PORT, STATUS_PORT
from lockstep_runtime.recovery.departures import PROBE_SECONDS
from lockstep_runtime.recovery.watchdog import CEILING_SECONDS

SETTINGS = Settings(runtime_image="registry.example/runtime:1", operator_namespace="lockstep-system")
HUB = {"huggingFace": {"repo": "Qwen/Qwen3-8B"}}
CRD = yaml.safe_load(CRD_SOURCE.read_text())
SCHEMA = CRD["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
KV_CACHE_MEMORY = SCHEMA["properties"]["engine"]["properties"]["kvCacheMemory"]
IMAGE = {"image": {"reference": "registry.example/qwen:1"}}
CLAIM = {"persistentVolumeClaim": {"claimName": "models", "path": "qwen"}}


def pod(spec: dict[str, Any], group: int = 0) -> dict[str, Any]:
    metadata = {"name": "chat", "namespace": "team", "uid": "u-1", "generation": 1}
    template = pod_template(parse({"metadata": metadata, "spec": spec}), group, "abc", SETTINGS)
    found: dict[str, Any] = template["spec"]
    return found


def started(spec: dict[str, Any], index: int, group: int = 0) -> tuple[ServeConfig, dict[str, str]]:
    """What pod `index` of the group makes of its arguments and variables, as the kubelet would fill them in."""
    container = pod(spec, group)["containers"][0]
    fields = {
        "metadata.name": f"chat-{group}-{index}",
        "spec.nodeName": "node-7",
        "metadata.labels['apps.kubernetes.io/pod-index']": str(index),
    }
    environment = {}
    for entry in container["env"]:
        source = entry.get("valueFrom", {})
        value = entry.get("value") or fields.get(source.get("fieldRef", {}).get("fieldPath"))
        environment[entry["name"]] = value or "secret {name}/{key}".format(**source["secretKeyRef"])
    return configuration(container["args"], environment), environment


def test_a_member_pod_learns_who_it_is() -> None:
    config, environment = started({"model": HUB, "tensorParallelSize": 4, "ranksPerPod": 2}, index=1, group=3)
    assert config == ServeConfig(
        model="Qwen/Qwen3-8B",
        download_dir="/cache",
        served_name="chat",
        model_name="chat",
        group=3,
        spec_revision="abc",
        tensor_parallel_size=4,
        ranks_per_pod=2,
        pod_index=1,
        pod="chat-3-1",
        node="node-7",
        leader="chat-3-0.chat-3.team.svc",
        threads_per_rank=1,  # as many as it asks for CPUs
        backend="cpu",
        device="cpu",
        host="::",
        lame_duck_seconds=config.lame_duck_seconds,
        grace_seconds=config.grace_seconds,
    )
    assert list(config.ranks) == [2, 3]
    assert not config.is_leader
    token, operator = environment[TOKEN_VARIABLE], environment[OPERATOR_TOKEN_FILE_VARIABLE]
    assert re.fullmatch("secret chat-token-[0-9a-f]{10}/token", token)
    assert operator == "/etc/lockstep/operator/token"
    assert API_KEY_FILE_VARIABLE not in environment


def test_every_setting_of_the_spec_arrives() -> None:
    hub = {"repo": "Qwen/Qwen3-8B", "revision": "v2", "tokenSecretRef": {"name": "hub", "key": "token"}}
    spec = {
        "model": {"huggingFace": hub, "servedName": "qwen"},
        "tensorParallelSize": 2,
        "dtype": "bfloat16",
        "backend": "cpu",
        "engine": {
            "maxModelLen": 4096,
            "maxSequences": 8,
            "maxBatchTokens": 512,
            "kvCacheMemory": "1.5Gi",
            "prefixCaching": False,
            "reasoningParser": "none",
            "toolCallParser": "qwen3_coder",
        },
        "vision": {"maxPixels": 300000, "minPixels": 70000},
        "apiKeySecretRef": {"name": "keys", "key": "chat"},
        "watchdog": {"floor": "1m30s", "factor": 2.5},
        "recovery": {"strategy": "RecyclePods", "weightCache": "Off"},
    }
    config, environment = started(spec, index=0)
    assert config.is_leader
    assert (config.served_name, config.model_revision) == ("qwen", "v2")
    assert (config.dtype, config.backend) == ("bfloat16", "cpu")
    assert config.limits == EngineLimits(
        max_model_len=4096, max_sequences=8, max_batch_tokens=512, kv_cache_bytes=3 * 2**29, prefix_caching=False
    )
    assert (config.reasoning_parser, config.tool_call_parser) == ("none", "qwen3_coder")
    assert config.vision == Vision(max_pixels=300_000, min_pixels=70_000)
    assert config.watchdog == Watchdog(floor=90.0, factor=2.5)
    assert (config.recovery_strategy, config.weight_cache) == ("RecyclePods", "Off")
    stepped = {"watchdog": {"stepTimeout": "500ms"}, "engine": {"prefixCaching": True}}
    fixed, _ = started({"model": HUB, "tensorParallelSize": 1, **stepped}, index=0)
    assert fixed.limits == EngineLimits()
    assert fixed.watchdog == Watchdog(step_timeout=0.5)
    assert environment[API_KEY_FILE_VARIABLE] == "/etc/lockstep/api-key/keys"
    assert config.source == Source(token_file="/etc/lockstep/hub-token/token")
    assert "HF_TOKEN" not in environment


def test_the_hub_of_the_installation_arrives_and_its_token_is_a_file() -> None:
    corp = ModelSource(name="corp", endpoint="https://hub.corp.example", token_secret=("hub", "token"), default=True)
    metadata = {"name": "chat", "namespace": "team", "uid": "u-1"}
    model = parse({"metadata": metadata, "spec": {"model": HUB, "tensorParallelSize": 1}}, (corp,))
    made = pod_template(model, 0, "abc", SETTINGS, commit="c" * 40)["spec"]
    config = configuration(made["containers"][0]["args"], {})
    assert config.source == Source(
        name="corp",
        endpoint="https://hub.corp.example",
        token_variable=None,
        token_file="/etc/lockstep/hub-token/token",
    )
    assert (config.model, config.model_commit, config.download_dir) == ("Qwen/Qwen3-8B", "c" * 40, "/cache")
    secret = {"secretName": "hub", "items": [{"key": "token", "path": "token"}], "optional": True}
    assert {"name": "hub-token", "secret": secret} in made["volumes"]
    assert violations(made) == []


def test_a_commit_that_is_pinned_is_no_part_of_the_revision() -> None:
    metadata = {"name": "chat", "namespace": "team", "uid": "u-1"}
    model = parse({"metadata": metadata, "spec": {"model": HUB, "tensorParallelSize": 1}})
    plain, pinned = (
        manifests.stateful_set(model, 0, "abc", rendered(model, SETTINGS), commit=commit) for commit in ("", "c" * 40)
    )
    args = [one["spec"]["template"]["spec"]["containers"][0].pop("args") for one in (plain, pinned)]
    assert set(args[1]) - set(args[0]) == {f"--commit={'c' * 40}"}
    assert plain["spec"] == pinned["spec"]
    assert plain["metadata"]["labels"] == pinned["metadata"]["labels"]


def test_where_ranks_compute_is_said_to_the_runtime_never_left_to_it() -> None:
    gpus = {"accelerator": {"resourceName": "nvidia.com/gpu"}, "tensorParallelSize": 2, "ranksPerPod": 2}
    for spec, expected in (({}, ("cpu", "cpu")), (gpus, ("cuda", "nccl")), ({"backend": "cpu"}, ("cpu", "cpu"))):
        config, environment = started({"model": HUB, "tensorParallelSize": 1, **spec}, index=0)
        assert (config.device, config.backend) == expected
        assert "LOCKSTEP_DEVICE" not in environment


QUANTITIES = [
    "2Gi",
    "512Mi",
    "1G",
    "1.5Gi",
    "700M",
    "1Ti",
    "4096Ki",
    "900000k",
    "1500000000",
    "1Pi",
    "2gi",
    "1ki",
    "1.Gi",
]


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_the_runtime_takes_the_sizes_that_the_crd_takes(quantity: str) -> None:
    admitted = re.fullmatch(KV_CACHE_MEMORY["pattern"], quantity) is not None
    spec = {"model": CLAIM, "tensorParallelSize": 1, "engine": {"kvCacheMemory": quantity}}
    try:
        understood = bool(started(spec, index=0)[0].limits.kv_cache_bytes)
    except click.UsageError:
        understood = False
    assert understood == admitted


def test_the_defaults_that_the_crd_names_are_the_runtimes() -> None:
    watchdog, repair = SCHEMA["properties"]["watchdog"]["properties"], SCHEMA["properties"]["recovery"]["properties"]
    config, _ = started({"model": HUB, "tensorParallelSize": 1}, index=0)
    assert watchdog["floor"]["description"].endswith(f"Unset means {config.watchdog.floor:g}s.")
    assert watchdog["factor"]["description"].endswith(f"Unset means {config.watchdog.factor:g}.")
    assert config.watchdog.step_timeout is None
    whole = SCHEMA["properties"]["watchdog"]["description"]
    assert whole.endswith(f"none is longer than {CEILING_SECONDS:g}s.")
    assert repair["strategy"]["description"].startswith(f"{config.recovery_strategy} (also when unset)")
    assert repair["weightCache"]["description"].startswith(f"{config.weight_cache} (also when unset)")
    budget, backoff = repair["budget"]["properties"], repair["backoff"]["properties"]
    policy = RecoverySpec()
    assert f"Unset means {policy.attempts}." in budget["attempts"]["description"]
    assert (duration("1h"), "Unset means 1h." in budget["window"]["description"]) == (policy.window, True)
    assert (duration("10s"), "Unset means 10s." in backoff["initial"]["description"]) == (policy.initial, True)
    assert (duration("10m"), "Unset means 10m" in backoff["max"]["description"]) == (policy.most, True)


def test_weights_are_cached_in_shared_memory_that_only_the_pods_limit_bounds() -> None:
    def shared(**recovery: str) -> dict[str, Any]:
        volumes = pod({"model": HUB, "tensorParallelSize": 2, "recovery": recovery})["volumes"]
        found: dict[str, Any] = next(volume["emptyDir"] for volume in volumes if volume["name"] == "shm")
        return found

    assert shared() == shared(weightCache="Memory") == {"medium": "Memory"}
    assert shared(weightCache="Off") == {"medium": "Memory", "sizeLimit": "1Gi"}


def test_a_model_on_a_volume_is_read_where_it_is() -> None:
    config, _ = started({"model": CLAIM, "tensorParallelSize": 1}, index=0)
    assert (config.model, config.download_dir) == ("/model/qwen", None)


@pytest.mark.parametrize("seconds", [60, 5, 600])
def test_requests_are_given_up_before_the_kubelet_kills(seconds: int) -> None:
    spec = {"model": HUB, "tensorParallelSize": 1, "template": {"spec": {"terminationGracePeriodSeconds": seconds}}}
    config, _ = started(spec, index=0)
    assert config.lame_duck_seconds + config.grace_seconds < seconds


def test_a_group_that_drains_waits_until_the_kubelet_has_noticed() -> None:
    probe = pod({"model": HUB, "tensorParallelSize": 2})["containers"][0]["readinessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] == PROBE_SECONDS


def test_ports_are_those_of_the_runtime() -> None:
    container = pod({"model": HUB, "tensorParallelSize": 1})["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    config, _ = started({"model": HUB, "tensorParallelSize": 1}, index=0)
    assert ports == {"api": API_PORT, "bus": BUS_PORT, "status": STATUS_PORT}
    assert (config.api_port, config.bus_port, config.status_port) == tuple(ports.values())


def test_other_ports_reach_the_runtime_and_whoever_speaks_to_it() -> None:
    wanted = {"api": 9000, "bus": 9400, "status": 9401}
    spec = {"model": HUB, "tensorParallelSize": 1, "ports": wanted}
    container = pod(spec)["containers"][0]
    config, _ = started(spec, index=0)
    assert {port["name"]: port["containerPort"] for port in container["ports"]} == wanted
    assert (config.api_port, config.bus_port, config.status_port) == (9000, 9400, 9401)
    assert {container[probe]["httpGet"]["port"] for probe in ("livenessProbe", "readinessProbe")} == {"status"}
    made = parse({"metadata": {"name": "chat", "namespace": "team", "uid": "u-1", "generation": 1}, "spec": spec})
    assert [port["port"] for port in manifests.headless_service(made, 0)["spec"]["ports"]] == [9400, 9401]
    (service,) = manifests.serving_service(made)["spec"]["ports"]
    assert (service["port"], service["targetPort"]) == (API_PORT, "api")
    _, clients, operator = manifests.network_policy(made, 0, SETTINGS)["spec"]["ingress"]
    assert [rule["ports"][0]["port"] for rule in (clients, operator)] == [9000, 9401]


def test_a_pod_on_its_nodes_network_still_finds_its_group_by_name() -> None:
    def policy(**template: Any) -> Any:
        return pod({"model": HUB, "tensorParallelSize": 1, "template": {"spec": template}}).get("dnsPolicy")

    assert policy() is None
    assert policy(hostNetwork=True) == "ClusterFirstWithHostNet"
    assert policy(hostNetwork=True, dnsPolicy="None") == "None"


CLAIMED = {
    "resourceClaims": [{"name": "gpus", "resourceClaimTemplateName": "four-gpus"}],
    "containers": [{"name": "lockstep", "resources": {"claims": [{"name": "gpus"}]}}],
}


def test_gpus_may_be_claimed_instead_of_requested() -> None:
    spec = {"model": HUB, "tensorParallelSize": 4, "ranksPerPod": 4, "backend": "nccl", "template": {"spec": CLAIMED}}
    config, environment = started(spec, index=0)
    assert (config.backend, config.device) == ("nccl", "cuda")
    resources = pod(spec)["containers"][0]["resources"]
    assert resources == {"claims": [{"name": "gpus"}], "requests": {"cpu": "8000m", "memory": "2048Mi"}}
    assert environment["LOCKSTEP_THREADS_PER_RANK"] == "4"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ({}, r"template.spec.resourceClaims \(there is none\)"),
        ({"resourceClaims": CLAIMED["resourceClaims"]}, r"one of template.spec.resourceClaims \(gpus\)"),
        ({**CLAIMED, "resourceClaims": [{"name": "other"}]}, r"\(other\) in resources.claims"),
        ({"resourceClaims": [{}]}, r"template.spec.resourceClaims\[0\]: .*name"),
    ],
)
def test_gpus_that_no_container_takes_are_told(template: dict[str, Any], words: str) -> None:
    metadata = {"name": "chat", "namespace": "team", "uid": "u-1", "generation": 1}
    spec = {"model": HUB, "tensorParallelSize": 1, "backend": "nccl", "template": {"spec": template}}
    assert re.search(words, parse({"metadata": metadata, "spec": spec}).flaw)


@pytest.mark.parametrize("model", [HUB, CLAIM, IMAGE, {**HUB, "cache": {"persistentVolumeClaim": {"claimName": "c"}}}])
def test_rank_pods_satisfy_the_restricted_profile(model: dict[str, Any]) -> None:
    spec = pod({"model": model, "tensorParallelSize": 2, "apiKeySecretRef": {"name": "keys", "key": "chat"}})
    assert violations(spec) == []
    assert spec["automountServiceAccountToken"] is False
    assert spec["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True


def test_only_a_folder_of_the_node_breaks_it() -> None:
    spec = pod({"model": {"hostPath": {"path": "/models"}}, "tensorParallelSize": 2})
    assert violations(spec) == ["volume model is a hostPath"]
