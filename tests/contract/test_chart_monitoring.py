"""The dashboard and the alerts of the chart speak of metrics and labels that there are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from tests.support.chart import of_kind, one, render
from tests.support.engine_stats import IDLE
from tests.support.kube_world import well

from lockstep_operator.decisions.node_suspicion import NodeFault
from lockstep_operator.decisions.pod_template import pod_template
from lockstep_operator.reporting.metrics import Metrics
from lockstep_operator.reporting.recovery_log import Repair
from lockstep_operator.settings import Settings
from lockstep_operator.types.model_status import Condition, ModelStatus, Savings
from lockstep_operator.types.names import ModelKey
from lockstep_operator.types.observed import GroupReport
from lockstep_operator.types.spec import parse
from lockstep_runtime.api.metrics import Metrics as EngineMetrics

KEY = ModelKey("team", "chat")
WORDS = {"lockstep", "lockstep_operator"}


# What the Prometheus operator gives to every series of a pod or of a Service's endpoints.
TARGET_LABELS = {"namespace", "pod", "container", "endpoint", "job", "instance"}


def monitor(kind: str) -> dict[str, Any]:
    """The only endpoint of the chart's monitor of that kind."""
    value = kind[0].lower() + kind[1:]
    manifests = render({"metrics": {value: {"enabled": True, "interval": "10s", "labels": {"release": "prom"}}}})
    rendered = one(manifests, kind)
    assert rendered["metadata"]["labels"]["release"] == "prom"
    (endpoint,) = rendered["spec"]["endpoints" if kind == "ServiceMonitor" else "podMetricsEndpoints"]
    assert endpoint["interval"] == "10s"
    return {**rendered["spec"], "endpoint": endpoint}


def series() -> dict[str, set[str]]:
    """Every series that Prometheus has of operator and engine, with the labels that it can be asked for."""
    operator = Metrics(lambda: 5.0)
    ready = Condition(type="Ready", status="True", reason="Ready", message="", last_transition_time=5.0)
    operator.model(KEY, ModelStatus(conditions=(ready,), savings=Savings(faults=1)))
    operator.node_faults([NodeFault(node="node-1", fault="Hang", key="", sentence="", at=1.0)])
    operator.reconciles.labels("wrote").inc()
    operator.reconciled(KEY, failed=True)
    operator.namespace("team", served=False)
    operator.repaired(
        KEY, [Repair(group=0, fault="Hang", rank=1, rung="Rebuild", noticed=1, finished=2, phases={"detect": 1})]
    )
    said = well(KEY, 0, "inc", "new")
    operator.stepped(
        KEY,
        {
            0: GroupReport(
                status=type(said)(**{n: getattr(said, n) for n in said.__struct_fields__} | {"last_step_at": 1.0})
            )
        },
    )
    engine = EngineMetrics("chat", lambda: IDLE)
    relabelled = {rule["targetLabel"] for rule in monitor("PodMonitor")["endpoint"]["relabelings"]}
    exposed = exposition(generate_latest(operator.registry)) | {
        name: labels | TARGET_LABELS | relabelled for name, labels in exposition(engine.render()).items()
    }
    assert "model" not in exposition(engine.render())["lockstep_epoch"], "the monitor's label would hide the engine's"
    return exposed


def exposition(text: bytes) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


SERIES = series()


def rules() -> list[dict[str, Any]]:
    rule = one(
        render({"metrics": {"prometheusRule": {"enabled": True, "labels": {"release": "prom"}}}}), "PrometheusRule"
    )
    assert rule["metadata"]["labels"]["release"] == "prom"
    return [alert for group in rule["spec"]["groups"] for alert in group["rules"]]


def dashboard() -> dict[str, Any]:
    (found,) = of_kind(render({"metrics": {"dashboard": {"enabled": True}}}), "ConfigMap")
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    board: dict[str, Any] = json.loads(found["data"]["lockstep.json"])
    return board


def expressions() -> Iterator[str]:
    yield from (rule["expr"] for rule in rules())
    for panel in dashboard()["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]["query"]


def wrong(expression: str) -> Iterator[str]:
    """What an expression names and nobody exposes."""
    used = re.findall(r"\b(lockstep_\w+)(?:\{([^}]*)\})?", expression)
    labels = set(re.findall(r"(\w+)\s*=~?\s*\"", expression))
    for names in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", expression):
        labels |= {name.strip() for name in names.split(",")}
    for metric, selector in used:
        if metric not in SERIES:
            yield f"{metric} is no metric"
        yield from (
            f"{metric} has no label {label}"
            for label in re.findall(r"(\w+)\s*=~?", selector)
            if label not in SERIES.get(metric, ())
        )
    known = set().union(*(SERIES.get(metric, set()) for metric, _ in used))
    yield from (f"{label} is a label of none of them" for label in sorted(labels - known))
    if not used:
        yield "it names no metric"


def test_nothing_is_made_unless_asked_for() -> None:
    manifests = render()
    assert not of_kind(manifests, "PrometheusRule")
    assert not [item for item in of_kind(manifests, "ConfigMap") if item["metadata"]["name"].endswith("-dashboard")]


def test_the_namespace_of_the_operators_metrics_is_the_models() -> None:
    """Else Prometheus renames it, and every alert tells of the operator's own."""
    assert monitor("ServiceMonitor")["endpoint"]["honorLabels"] is True
    named = exposition(generate_latest(Metrics().registry))
    assert not {label for labels in named.values() for label in labels} & (TARGET_LABELS - {"namespace"})


def test_each_groups_leader_is_scraped_and_no_other_pod() -> None:
    metadata = {"name": "chat", "namespace": "team", "uid": "u-1"}
    model = parse({"metadata": metadata, "spec": {"model": {"hostPath": {"path": "/m"}}, "tensorParallelSize": 2}})
    template = pod_template(model, 3, "abc", Settings(runtime_image="registry.example/runtime:1"))
    spec = monitor("PodMonitor")
    labels = {**template["metadata"]["labels"], "apps.kubernetes.io/pod-index": "0"}
    wanted = spec["selector"]["matchLabels"]
    assert wanted.items() <= labels.items()
    assert not wanted.items() <= {**labels, "apps.kubernetes.io/pod-index": "1"}.items()
    ports = [port["name"] for port in template["spec"]["containers"][0]["ports"]]
    assert spec["endpoint"]["port"] in ports
    scraped = {"__meta_kubernetes_pod_label_" + re.sub(r"\W", "_", name): value for name, value in labels.items()}
    relabelings = spec["endpoint"]["relabelings"]
    given = {rule["targetLabel"]: scraped[rule["sourceLabels"][0]] for rule in relabelings}
    assert given == {"model": "chat", "group": "3"}


@pytest.mark.parametrize(("watched", "selector"), [([], {"any": True}), (["a", "b"], {"matchNames": ["a", "b"]})])
def test_models_are_scraped_where_they_are_served(watched: list[str], selector: dict[str, Any]) -> None:
    values = {"watchNamespaces": watched, "metrics": {"podMonitor": {"enabled": True}}}
    assert one(render(values), "PodMonitor")["spec"]["namespaceSelector"] == selector


def test_every_expression_is_about_metrics_that_there_are() -> None:
    found = list(expressions())
    assert len(found) >= 15
    assert {expression: [*wrong(expression)] for expression in found if [*wrong(expression)]} == {}


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ("lockstep_gone_total", ["lockstep_gone_total is no metric"]),
        (
            'lockstep_operator_models{shape="x"}',
            ["lockstep_operator_models has no label shape", "shape is a label of none of them"],
        ),
        ("sum by (colour) (lockstep_operator_groups)", ["colour is a label of none of them"]),
        ("vector(1)", ["it names no metric"]),
    ],
)
def test_the_checker_can_say_no(expression: str, found: list[str]) -> None:
    assert [*wrong(expression)] == found


def test_every_alert_says_what_is_wrong_and_where_to_look() -> None:
    for rule in rules():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"].endswith(".")
        assert len(rule["annotations"]["description"].split()) > 5
    assert len({rule["alert"] for rule in rules()}) == len(rules())


def test_panels_have_their_own_places_and_descriptions() -> None:
    panels = dashboard()["panels"]
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert all(x < 24 for x, _ in cells)
    assert all(panel["description"] for panel in panels)
