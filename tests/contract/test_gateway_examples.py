"""The examples for gateways and autoscalers speak of metrics, labels and ports that a model has.

Whether the other projects take them is asked of their schemas, on the cluster: tests/e2e/test_other_projects.py.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families
from tests.support.chart import ROOT
from tests.support.engine_stats import IDLE
from tests.support.operator_models import SETTINGS, model

from lockstep_operator.decisions import manifests, mesh
from lockstep_operator.decisions.pod_template import pod_template
from lockstep_operator.types.names import ModelKey
from lockstep_runtime.api.metrics import Metrics

EXAMPLES = ROOT / "examples"
SERVED = yaml.safe_load((EXAMPLES / "qwen3-8b-gpu.yaml").read_text())["metadata"]["name"]
PAGE = Metrics("chat", lambda: IDLE).render().decode()
KINDS = {family.name: family.type for family in text_string_to_metric_families(PAGE)}
POD = pod_template(model(), 0, "abc", SETTINGS)
PORTS = {port["name"]: port["containerPort"] for port in POD["spec"]["containers"][0]["ports"]}


def documents(path: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((EXAMPLES / path).read_text()))


def test_the_endpoint_picker_finds_its_metrics_by_the_pods_label() -> None:
    (config,) = documents("gateway/endpoint-picker.yaml")
    (extractor,) = (plugin for plugin in config["plugins"] if plugin["type"] == "core-metrics-extractor")
    (engine,) = extractor["parameters"]["engineConfigs"]
    assert POD["metadata"]["labels"]["llm-d.ai/engine-type"] == engine.pop("name")
    assert len(engine) == 3
    assert {KINDS[metric] for metric in engine.values()} == {"gauge"}
    declared = {plugin["type"] for plugin in config["plugins"]}
    named = [one["pluginRef"] for profile in config["schedulingProfiles"] for one in profile["plugins"]]
    named += [one["pluginRef"] for source in config["dataLayer"]["sources"] for one in [source, *source["extractors"]]]
    assert set(named) <= declared


def test_the_pool_has_the_leaders_of_the_example_and_the_route_leads_to_it() -> None:
    pool, route = documents("gateway/inference-pool.yaml")
    service = manifests.serving_service(model(key=ModelKey("default", SERVED)))["spec"]
    assert pool["spec"]["selector"]["matchLabels"] == service["selector"]
    assert pool["spec"]["targetPorts"] == [{"number": PORTS[service["ports"][0]["targetPort"]]}]
    (backend,) = route["spec"]["rules"][0]["backendRefs"]
    group = pool["apiVersion"].partition("/")[0]
    assert backend == {"group": group, "kind": pool["kind"], "name": pool["metadata"]["name"]}


def test_autoscalers_read_metrics_that_there_are_and_write_to_the_scale_of_the_example() -> None:
    (hpa,), (keda,) = documents("autoscaling/hpa.yaml"), documents("autoscaling/keda.yaml")
    target = {"apiVersion": "lockstep.dev/v1beta1", "kind": "TensorParallelModel", "name": SERVED}
    assert hpa["spec"]["scaleTargetRef"] == keda["spec"]["scaleTargetRef"] == target
    read = [metric["pods"]["metric"]["name"] for metric in hpa["spec"]["metrics"]]
    queries = [trigger["metadata"]["query"] for trigger in keda["spec"]["triggers"]]
    read += [name for query in queries for name in re.findall(r"lockstep_\w+", query)]
    assert {KINDS[name] for name in read} == {"gauge"}
    assert keda["spec"]["minReplicaCount"] == 0


def test_only_the_groups_own_pods_and_the_operator_reach_the_ranks_through_the_mesh() -> None:
    (policy,) = documents("mesh/istio.yaml")
    anybody, members, operator = policy["spec"]["rules"]
    assert anybody == {"to": [{"operation": {"ports": [str(PORTS["api"])]}}]}
    assert operator["to"] == [{"operation": {"ports": [str(PORTS["status"])]}}]
    account = manifests.service_account(model(key=ModelKey("default", SERVED)))["metadata"]["name"]
    assert members["from"][0]["source"]["principals"] == [f"cluster.local/ns/default/sa/{account}"]
    assert "to" not in members


def test_istio_knows_the_annotations_of_the_pods() -> None:
    listed = yaml.safe_load((ROOT / ".dev" / "schemas" / "annotations.yaml").read_text())["annotations"]
    of_pods = {one["name"] for one in listed if "Pod" in one["resources"] and not one["deprecated"]}
    assert {mesh.INBOUND, mesh.OUTBOUND} <= of_pods
