"""Prometheus with the chart's monitors: whatever alerts and dashboard ask for is there, and is the right model's."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from tests.support.chart import of_kind, one, render
from tests.support.cluster_api import ClusterApi
from tests.support.cluster_faults import WORKER
from tests.support.cluster_load import Load
from tests.support.cluster_model import Model, tiny_chat
from tests.support.cluster_processes import kill, one_process
from tests.support.kubernetes_discovery import discovered
from tests.support.prometheus import Prometheus, Series, prometheus
from tests.support.prometheus_operator import jobs
from tests.support.wait import until

FILLED_SECONDS: Final = 60.0
HEALED_SECONDS: Final = 60.0
MONITORS: Final = ("serviceMonitor", "podMonitor")
VALUES: Final[dict[str, Any]] = {
    "metrics": {name: {"enabled": True, "interval": "1s"} for name in MONITORS}
    | {"prometheusRule": {"enabled": True}, "dashboard": {"enabled": True}}
}
CHART: Final = render(VALUES)
FAULTS: Final = "lockstep_operator_recoveries_total"  # of models that had one
ABSENT: Final = "absent("
SAVINGS: Final = ("_healed_faults", "_kept_requests", "_paused_seconds", "_avoided_restart_seconds")
# Only an operator with `watchNamespaces` has it: see test_namespaces.py.
ELSEWHERE: Final = "lockstep_operator_namespace_served"


def alerts() -> dict[str, str]:
    """The expressions by the alerts' names, with 0 or 1 as the answer to their questions, where Prometheus would give
    nothing instead of 0."""
    groups = one(CHART, "PrometheusRule")["spec"]["groups"]
    found = {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}
    return {name: _answered(expression) for name, expression in found.items() if ELSEWHERE not in expression}


def panels() -> dict[str, str]:
    (board,) = of_kind(CHART, "ConfigMap")
    targets = [
        (panel["title"], target)
        for panel in json.loads(board["data"]["lockstep.json"])["panels"]
        for target in panel["targets"]
    ]
    return {f"{title} {target['refId']}": _answered(target["expr"]) for title, target in targets}


def variables() -> list[tuple[str, str]]:
    """Selector and label of those that the dashboard asks Prometheus for."""
    (board,) = of_kind(CHART, "ConfigMap")
    listed = json.loads(board["data"]["lockstep.json"])["templating"]["list"]
    queries = [variable["query"]["query"] for variable in listed if variable["type"] == "query"]
    found = [re.fullmatch(r"label_values\((.*), (\w+)\)", query) for query in queries]
    return [(match[1], match[2]) for match in found if match]


def _answered(expression: str) -> str:
    return re.sub(r"(==|>|<)\s*(?=\d)", r"\1 bool ", expression)


@pytest.fixture
def pair(api: ClusterApi, namespace: str, served: Model) -> Iterator[tuple[Model, Model]]:
    """Two models of one name; the second is the test's own."""
    second = Model(api, namespace, served.name)
    second.apply(tiny_chat(tensorParallelSize=1))
    second.until_ready()
    yield served, second
    second.delete()


def test_every_alert_and_panel_has_series_of_the_model_that_they_are_about(
    pair: tuple[Model, Model], folder: Path
) -> None:
    """After real faults, of one of the two."""
    monitors = [one(CHART, kind[0].upper() + kind[1:]) for kind in MONITORS]
    scraped = [discovered(job, folder) for monitor in monitors for job in jobs(monitor)]
    well, faulty = pair
    with prometheus(scraped, folder) as server, Load(well, clients=1), Load(faulty, clients=1):
        until("both to be scraped", lambda: scraped_leaders(server) >= leaders(*pair), FILLED_SECONDS)
        break_rank(faulty)
        counted = next(expression for expression in panels().values() if FAULTS in expression)
        until("it to be counted", lambda: of(server, counted, faulty), FILLED_SECONDS)
        assert of(server, counted, faulty) == [1.0], "the first fault, though its counter began with it"
        break_rank(faulty)  # a rate of the phases' seconds needs two
        explain = lambda: "\n".join(lacking(server, well, faulty))  # noqa: E731
        until("all to have series", lambda: not lacking(server, well, faulty), FILLED_SECONDS, explain)

        for expression in panels().values():
            if FAULTS in expression:
                assert of(server, expression, well) == [], "none of the other model's faults"
        assert server.ask('{exported_namespace!=""}') == []
        assert scraped_leaders(server) & members(*pair) == leaders(*pair), "no other pod of theirs"
        for selector, label in variables():
            value = {"namespace": faulty.namespace, "model": faulty.name}[label]
            assert value in server.labelled(label, filled(selector, faulty))


def break_rank(model: Model) -> None:
    """And wait until the status counts the repair."""
    before = model.status()["recoveries"]
    kill(one_process(model.pod(0, 0), WORKER))
    model.until("the rank to be healed", lambda: model.status()["recoveries"] > before, HEALED_SECONDS)
    model.until_ready()


def lacking(server: Prometheus, well: Model, faulty: Model) -> list[str]:
    """Alerts and panels without a number for a model that they should have one of."""
    found = [
        f"{model.namespace}: {name}: {filled(expression, model)}"
        for model in (well, faulty)
        for name, expression in panels().items()
        if (model is faulty or not counts_faults(expression)) and not of(server, expression, model)
    ]
    for name, expression in alerts().items():
        series = server.ask(expression)
        wanted = [faulty] if counts_faults(expression) else [well, faulty]
        about = {(one["metric"].get("namespace"), one["metric"]["model"]) for one in series if "model" in one["metric"]}
        if ABSENT in expression:
            found += [f"{name} fires, while the operator is scraped"] if series else []
        elif not numbers(series):
            found.append(f"{name}: {expression}")
        elif about:  # else it is about the operator
            found += [f"{model.namespace}: {name}" for model in wanted if (model.namespace, model.name) not in about]
    return found


def counts_faults(expression: str) -> bool:
    """Whether it has no series before the first: of the group's own count, or of what healing was worth."""
    return any(name in expression for name in (FAULTS, *SAVINGS))


def of(server: Prometheus, expression: str, model: Model) -> list[float]:
    """The numbers that a panel shows with this model chosen."""
    return numbers(server.ask(filled(expression, model)))


def filled(expression: str, model: Model) -> str:
    return expression.replace("$namespace", model.namespace).replace("$model", model.name)


def numbers(series: list[Series]) -> list[float]:
    values = [float(one["value"][1]) for one in series]
    return [value for value in values if not math.isnan(value)]


def scraped_leaders(server: Prometheus) -> set[tuple[str, str]]:
    """Pods that Prometheus gets metrics of."""
    return {
        (target["labels"]["namespace"], target["labels"]["pod"])
        for target in server.targets()
        if target["health"] == "up" and "group" in target["labels"]
    }


def members(*models: Model) -> set[tuple[str, str]]:
    return {(model.namespace, pod["metadata"]["name"]) for model in models for pod in model.pods()}


def leaders(*models: Model) -> set[tuple[str, str]]:
    return {(namespace, pod) for namespace, pod in members(*models) if pod.endswith("-0-0")}
