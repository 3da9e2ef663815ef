"""What the chart's values do, which of them are refused, and that each is explained."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import yaml
from tests.support.chart import CHART, LEAST_VALUES, Manifest, helm, of_kind, one, pod_specs, render, template
from tests.support.operator_settings import read_settings

import lockstep_runtime
from lockstep_operator.settings import ModelSource, Settings
from lockstep_operator.types.names import OPERATOR_POD_LABELS


def container(values: Mapping[str, Any] | None = None) -> Manifest:
    found: Manifest = one(render(values), "Deployment")["spec"]["template"]["spec"]["containers"][0]
    return found


def environment(values: Mapping[str, Any] | None = None) -> dict[str, str | None]:
    return {entry["name"]: entry.get("value") for entry in container(values)["env"]}


def test_the_chart_passes_lint_strictly() -> None:
    result = helm("lint", "--strict", str(CHART), "--values", LEAST_VALUES)
    assert result.returncode == 0, result.stdout + result.stderr


def test_chart_package_and_app_have_one_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (lockstep_runtime.__version__, lockstep_runtime.__version__)


def test_there_are_two_operators_on_different_nodes_and_one_is_always_left() -> None:
    manifests = render()
    deployment = one(manifests, "Deployment")["spec"]
    rolling = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    assert (deployment["replicas"], deployment["strategy"]) == (2, rolling)
    pod, labels = deployment["template"]["spec"], deployment["selector"]["matchLabels"]
    spread = [(one["topologyKey"], one["whenUnsatisfiable"]) for one in pod["topologySpreadConstraints"]]
    assert spread == [("kubernetes.io/hostname", "ScheduleAnyway")]
    assert pod["topologySpreadConstraints"][0]["labelSelector"] == {"matchLabels": labels}
    assert {(one["key"], one["tolerationSeconds"]) for one in pod["tolerations"]} == {
        ("node.kubernetes.io/not-ready", 30), ("node.kubernetes.io/unreachable", 30),
    }  # fmt: skip
    budget = one(manifests, "PodDisruptionBudget")["spec"]
    assert (budget["minAvailable"], budget["selector"]["matchLabels"]) == (1, labels)
    assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


@pytest.mark.parametrize("values", [{"replicas": 1}, {"podDisruptionBudget": {"enabled": False}}])
def test_one_operator_has_no_budget_that_would_block_every_drain(values: dict[str, Any]) -> None:
    assert not of_kind(render(values), "PodDisruptionBudget")


def test_a_spread_of_ones_own_keeps_its_selector() -> None:
    own = {"topologyKey": "zone", "maxSkew": 2, "labelSelector": {"matchLabels": {"a": "b"}}}
    pod = one(render({"topologySpreadConstraints": [own]}), "Deployment")["spec"]["template"]["spec"]
    assert pod["topologySpreadConstraints"] == [own]


def test_images_default_to_the_charts_version() -> None:
    version = lockstep_runtime.__version__
    assert container()["image"] == f"registry.example/lockstep/operator:{version}"
    assert environment()["LOCKSTEP_RUNTIME_IMAGE"] == f"registry.example/lockstep/runtime:{version}"


@pytest.mark.parametrize("image", ["image", "runtimeImage"])
def test_an_image_that_nobody_named_is_never_guessed(image: str) -> None:
    result = template({image: {"repository": ""}})
    assert result.returncode != 0, "helm took it"
    assert f"{image}.repository must be set" in result.stderr


def test_a_digest_says_which_image_whatever_the_tag() -> None:
    digest = f"sha256:{'0f' * 32}"
    values = {"image": {"tag": "dev", "digest": digest}, "runtimeImage": {"digest": digest}}
    images = {spec["containers"][0]["image"] for spec in pod_specs(render(values)).values()}
    assert images == {f"registry.example/lockstep/operator@{digest}"}
    assert environment(values)["LOCKSTEP_RUNTIME_IMAGE"] == f"registry.example/lockstep/runtime@{digest}"


def test_the_users_and_groups_can_be_left_to_the_cluster() -> None:
    nothing = {"runAsUser": None, "runAsGroup": None, "fsGroup": None}
    by_default = pod_specs(render())
    for name, spec in pod_specs(render({"podSecurityContext": nothing})).items():
        assert spec["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
        assert by_default[name]["securityContext"] == spec["securityContext"] | dict.fromkeys(nothing, 65532)
    assert read_settings([], told({"models": {"fsGroup": None}})).fs_group is None
    assert read_settings([], told({"models": {"fsGroup": 1000680000}})).fs_group == 1000680000


def told(values: Mapping[str, Any]) -> dict[str, str]:
    """What the operator's container gets as variables, in the namespace `system`."""
    told = {name: value for name, value in environment(values).items() if value is not None}
    return {**told, "LOCKSTEP_OPERATOR_NAMESPACE": "system"}


def test_images_are_as_asked_for() -> None:
    values = {
        "image": {"repository": "registry.example:5000/a/operator", "tag": "dev", "pullPolicy": "Always"},
        "runtimeImage": {"repository": "registry.example:5000/a/runtime", "tag": "v2_0", "pullPolicy": "Never"},
        "imagePullSecrets": [{"name": "pull"}],
    }
    operator = container(values)
    assert (operator["image"], operator["imagePullPolicy"]) == ("registry.example:5000/a/operator:dev", "Always")
    assert environment(values)["LOCKSTEP_RUNTIME_IMAGE"] == "registry.example:5000/a/runtime:v2_0"
    assert environment(values)["LOCKSTEP_RUNTIME_IMAGE_PULL_POLICY"] == "Never"
    for pod in (one(render(values), "Deployment")["spec"]["template"], one(render(values), "Pod")):
        assert pod["spec"]["imagePullSecrets"] == [{"name": "pull"}]


def test_the_operator_is_told_its_settings() -> None:
    values = {"logLevel": "debug", "concurrency": 3, "resyncSeconds": 20, "watchNamespaces": ["a", "b"]}
    told = environment(values)
    assert told["LOCKSTEP_LOG_LEVEL"] == "debug"
    assert told["LOCKSTEP_CONCURRENCY"] == "3"
    assert told["LOCKSTEP_RESYNC_SECONDS"] == "20"
    assert told["LOCKSTEP_NAMESPACES"] == "a,b"
    assert "LOCKSTEP_NAMESPACES" not in environment()


def test_the_operator_understands_what_it_is_told() -> None:
    gateway = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "gateway's"}}}
    prometheus = {"podSelector": {}, "namespaceSelector": {"matchExpressions": [{"key": "m", "operator": "Exists"}]}}
    values = {
        "logLevel": "warning",
        "logFormat": "json",
        "concurrency": 3,
        "resyncSeconds": 20,
        "watchNamespaces": ["a", "b"],
        "livePage": {"access": "Off"},
        "runtimeImage": {"pullSecrets": ["one", "two"]},
        "models": {
            "tracing": {"endpoint": "http://collector:4318"},
            "sources": [{"name": "corp", "endpoint": "https://hub", "tokenSecretRef": {"name": "a", "key": "b"}}],
            "networkPolicy": {"policy": "None", "apiFrom": [gateway], "scrapeFrom": [prometheus]},
        },
    }
    assert container(values)["ports"][0]["containerPort"] == 8080
    assert read_settings([], told(values)) == Settings(
        runtime_image=f"registry.example/lockstep/runtime:{lockstep_runtime.__version__}",
        pull_policy="IfNotPresent",
        namespaces=("a", "b"),
        lease="lockstep",
        key_secret="lockstep-key",
        operator_namespace="system",
        port=8080,
        live_page="Off",
        tracing_endpoint="http://collector:4318",
        concurrency=3,
        resync_seconds=20.0,
        log_level="warning",
        log_format="json",
        pull_secrets=("one", "two"),
        network_policy="None",
        api_from=(gateway,),
        scrape_from=(prometheus,),
        sources=(ModelSource(name="corp", endpoint="https://hub", token_secret=("a", "b")),),
    )
    assert read_settings([], told({})) == Settings(
        runtime_image=f"registry.example/lockstep/runtime:{lockstep_runtime.__version__}",
        lease="lockstep",
        key_secret="lockstep-key",
        operator_namespace="system",
        watch_nodes=True,
    ), "the chart's defaults are the operator's, but that it lets it list the nodes"


def test_services_of_the_namespace_set_none_of_its_variables() -> None:
    assert one(render(), "Deployment")["spec"]["template"]["spec"]["enableServiceLinks"] is False


def test_rank_pods_let_in_what_the_chart_runs() -> None:
    labels = one(render(), "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert OPERATOR_POD_LABELS.items() <= labels.items()
    namespace = next(entry for entry in container()["env"] if entry["name"] == "LOCKSTEP_OPERATOR_NAMESPACE")
    assert namespace["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.namespace"}}


def test_large_numbers_are_not_written_as_floats() -> None:
    assert environment({"resyncSeconds": 86400})["LOCKSTEP_RESYNC_SECONDS"] == "86400"


def test_the_pod_is_placed_and_labelled_as_asked_for() -> None:
    values = {
        "nodeSelector": {"pool": "system"},
        "tolerations": [{"operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "priorityClassName": "high",
        "podLabels": {"team": "serving", "app.kubernetes.io/component": "mine"},
        "podAnnotations": {"note": "x"},
        "resources": {"requests": {"cpu": 1, "memory": "1Gi"}, "limits": {"memory": "1Gi"}},
    }
    template = one(render(values), "Deployment")["spec"]["template"]
    spec = template["spec"]
    assert spec["nodeSelector"] == {"pool": "system"}
    assert spec["tolerations"] == [{"operator": "Exists"}]
    assert spec["affinity"] == {"nodeAffinity": {}}
    assert spec["priorityClassName"] == "high"
    assert spec["containers"][0]["resources"] == values["resources"]
    assert template["metadata"]["labels"]["team"] == "serving"
    assert template["metadata"]["annotations"]["note"] == "x"
    # The rank pods' NetworkPolicies and the chart's own selectors look for it.
    assert template["metadata"]["labels"]["app.kubernetes.io/component"] == "operator"


@pytest.mark.parametrize("release", ["lockstep", "prod", "a" * 53])
def test_selectors_match_the_pod_whatever_the_release_is_called(release: str) -> None:
    manifests = render({"networkPolicy": {"enabled": True}}, release=release)
    deployment = one(manifests, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"].items()
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels
    assert one(manifests, "Service")["spec"]["selector"].items() <= labels
    assert one(manifests, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"].items() <= labels
    labelled = [manifest for manifest in manifests if not manifest["kind"].startswith("ClusterRole")]
    assert all(len(manifest["metadata"]["name"]) <= 63 for manifest in labelled)


def test_two_releases_share_no_name() -> None:
    def names(release: str) -> set[tuple[str, str]]:
        manifests = render({"crds": {"install": release == "one"}}, release=release)
        return {(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests}

    assert not names("one") & names("two")


def test_the_service_reaches_the_operators_port() -> None:
    manifests = render({"metrics": {"service": {"port": 9000, "annotations": {"scrape": "yes"}}}})
    service = one(manifests, "Service")
    assert service["metadata"]["annotations"] == {"scrape": "yes"}
    assert (service["spec"]["ports"][0]["port"], service["spec"]["ports"][0]["targetPort"]) == (9000, "http")
    assert one(manifests, "Deployment")["spec"]["template"]["spec"]["containers"][0]["ports"][0]["name"] == "http"
    assert any(":9000/healthz" in argument for argument in one(manifests, "Pod")["spec"]["containers"][0]["args"])


@pytest.mark.parametrize("kind", ["ServiceMonitor", "PodMonitor"])
def test_a_monitor_is_made_only_when_asked_for(kind: str) -> None:
    assert not of_kind(render(), kind)


def test_the_network_policy_is_made_only_when_asked_for() -> None:
    assert not of_kind(render(), "NetworkPolicy")
    peer = {"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}
    rule = one(render({"networkPolicy": {"enabled": True, "from": [peer]}}), "NetworkPolicy")["spec"]["ingress"][0]
    no_model = {"key": "lockstep.dev/model", "operator": "DoesNotExist"}
    labels = {"app.kubernetes.io/instance": "lockstep"}
    own = {"podSelector": {"matchLabels": labels, "matchExpressions": [no_model]}}
    assert rule["from"] == [own, peer]


def test_the_live_page_leaves_its_pod_only_when_asked_to() -> None:
    asked = {"access": "Cluster", "service": {"port": 80, "annotations": {"auth": "yes"}}}
    closed = {"port": "http", "protocol": "TCP"}
    for access in ("Local", "Off"):
        manifests = render({"livePage": {"access": access}, "networkPolicy": {"enabled": True}})
        assert len(of_kind(manifests, "Service")) == 1
        assert [port["name"] for port in container({"livePage": {"access": access}})["ports"]] == ["http"]
        assert one(manifests, "NetworkPolicy")["spec"]["ingress"][0]["ports"] == [closed]

    manifests = render({"livePage": asked, "networkPolicy": {"enabled": True}})
    _, service = sorted(of_kind(manifests, "Service"), key=lambda made: made["metadata"]["name"], reverse=True)
    assert service["metadata"]["name"].endswith("-live")
    assert (service["spec"]["type"], service["metadata"]["annotations"]) == ("ClusterIP", {"auth": "yes"})
    assert [(port["port"], port["targetPort"]) for port in service["spec"]["ports"]] == [(80, "live")]
    hosts = [
        entry["valueFrom"] for entry in container({"livePage": asked})["env"] if entry["name"] == "LOCKSTEP_LIVE_HOST"
    ]
    assert hosts == [{"fieldRef": {"fieldPath": "status.podIP"}}], "an operator that stands by passes readers on"
    opened = {port["name"]: port["containerPort"] for port in container({"livePage": asked})["ports"]}
    assert opened == {"http": 8080, "live": Settings(runtime_image="any").live_port}
    assert one(manifests, "NetworkPolicy")["spec"]["ingress"][0]["ports"] == [closed, closed | {"port": "live"}]


@pytest.mark.parametrize("create", [True, False])
def test_the_service_account_is_made_or_taken(create: bool) -> None:
    manifests = render({"serviceAccount": {"create": create, "name": "mine", "annotations": {"role": "x"}}})
    assert one(manifests, "Deployment")["spec"]["template"]["spec"]["serviceAccountName"] == "mine"
    assert [m["metadata"]["annotations"] for m in of_kind(manifests, "ServiceAccount")] == [{"role": "x"}] * create


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"imagePullPolicy": "Always"}, "imagePullPolicy"),
        ({"image": {"repository": "name:tag"}}, "/image/repository"),
        ({"image": {"repository": "Upper/case"}}, "/image/repository"),
        ({"image": {"tag": 1.0}}, "/image/tag"),
        ({"image": {"digest": "0f" * 32}}, "/image/digest"),
        ({"runtimeImage": {"digest": "sha256:0f"}}, "/runtimeImage/digest"),
        ({"runtimeImage": {"pullSecrets": [{"name": "a"}]}}, "/runtimeImage/pullSecrets/0"),
        ({"podSecurityContext": {"runAsUser": 0}}, "/podSecurityContext/runAsUser"),
        ({"models": {"networkPolicy": {"policy": "Off"}}}, "/models/networkPolicy/policy"),
        ({"models": {"networkPolicy": {"apiFrom": [{}]}}}, "/models/networkPolicy/apiFrom/0"),
        ({"models": {"sources": [{"endpoint": "https://a"}]}}, "/models/sources/0"),
        ({"models": {"sources": [{"name": "a", "token": "x"}]}}, "/models/sources/0"),
        ({"models": {"sources": [{"name": "a", "endpoint": "hub"}]}}, "/models/sources/0/endpoint"),
        ({"logFormat": "xml"}, "/logFormat"),
        ({"runtimeImage": {"pullPolicy": "Sometimes"}}, "/runtimeImage/pullPolicy"),
        ({"watchNamespaces": "default"}, "/watchNamespaces"),
        ({"watchNamespaces": ["Not_a_name"]}, "/watchNamespaces/0"),
        ({"watchNamespaces": ["a", "a"]}, "/watchNamespaces"),
        ({"logLevel": "verbose"}, "/logLevel"),
        ({"concurrency": 0}, "/concurrency"),
        ({"resyncSeconds": "60"}, "/resyncSeconds"),
        ({"resources": {"limits": {"memory": "lots"}}}, "/resources/limits/memory"),
        ({"podLabels": {"a": 1}}, "/podLabels/a"),
        ({"livePage": {"access": "World"}}, "/livePage/access"),
        ({"models": {"tracing": {"endpoint": "collector:4318"}}}, "/models/tracing/endpoint"),
        ({"metrics": {"service": {"port": 70000}}}, "/metrics/service/port"),
        ({"metrics": {"serviceMonitor": {"interval": "often"}}}, "/metrics/serviceMonitor/interval"),
        ({"metrics": {"podMonitor": {"interval": "often"}}}, "/metrics/podMonitor/interval"),
        ({"networkPolicy": {"from": [{}]}}, "/networkPolicy/from/0"),
        ({"serviceAccount": {"create": "yes"}}, "/serviceAccount/create"),
    ],
)
def test_the_schema_refuses_and_names_the_place(values: dict[str, Any], place: str) -> None:
    result = template(values)
    assert result.returncode != 0, "helm took it"
    assert place in result.stderr


def _leaves(schema: Manifest, values: Manifest, path: str = "") -> Iterator[str]:
    """Paths of values that the schema does not know, and of schema's properties that have no default."""
    if "$ref" in schema:
        schema = json.loads((CHART / "values.schema.json").read_text())["definitions"][schema["$ref"].split("/")[-1]]
    known = schema.get("properties")
    if known is None:
        return
    yield from (f"{path}/{name}" for name in set(known) ^ set(values) if name != "global")
    for name in set(known) & set(values):
        if isinstance(values[name], dict):
            yield from _leaves(known[name], values[name], f"{path}/{name}")


def test_values_and_schema_know_the_same_fields() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    values["resources"] = {"requests": {}, "limits": {}}
    assert sorted(_leaves(schema, values)) == []


def test_every_value_is_explained() -> None:
    previous, unexplained, commented = "", [], ("image:", "runtimeImage:")
    for line in (CHART / "values.yaml").read_text().splitlines():
        text = line.strip()
        is_value = bool(text) and not text.startswith("#")
        opens_a_group = text.endswith(":") and text not in commented
        inside_resources = text.split(":")[0] in {"requests", "limits", "cpu", "memory"}
        if is_value and not opens_a_group and not inside_resources and not previous.startswith("#"):
            unexplained.append(text)
        previous = text
    assert unexplained == []
