"""The tests' translation of monitors is the Prometheus operator's: compared with what its own tests expect of it."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from tests.support.chart import ROOT
from tests.support.prometheus_operator import jobs

SHARDING = 3  # rules at the end, which belong to a Prometheus object


@pytest.mark.parametrize(
    ("kind", "endpoints", "port", "golden"),
    [
        ("ServiceMonitor", "endpoints", "web", "monitorObjectWithoutScrapeClass.golden"),
        ("PodMonitor", "podMetricsEndpoints", "podname", "podMonitorObjectWithPodName.golden"),
    ],
)
def test_a_monitor_becomes_the_job_that_the_operator_makes(kind: str, endpoints: str, port: str, golden: str) -> None:
    monitor: dict[str, Any] = {
        "kind": kind,
        "metadata": {"namespace": "default", "name": f"default{kind}"},
        "spec": {
            "selector": {"matchLabels": {"group": "group1"}},
            endpoints: [{"port": port, "path": "/metrics", "interval": "30s"}],
        },
    }
    content = yaml.safe_load((ROOT / ".dev" / "schemas" / golden).read_text())
    (made,) = jobs(monitor)
    (expected,) = (job for job in content["scrape_configs"] if job["job_name"] == made["job_name"])

    for rule in expected["relabel_configs"]:
        rule.pop("separator", None)  # it is the default one
    assert made["relabel_configs"] == expected["relabel_configs"][:-SHARDING]
    (found,), (discovery,) = made.pop("kubernetes_sd_configs"), expected.pop("kubernetes_sd_configs")
    assert found == discovery
    same = ("job_name", "honor_labels", "scrape_interval")
    assert [made[name] for name in same] == [expected[name] for name in same]


def test_a_field_that_nobody_has_translated_is_an_error() -> None:
    endpoint = {"port": "web", "path": "/metrics", "interval": "30s", "metricRelabelings": []}
    spec = {"selector": {"matchLabels": {}}, "podMetricsEndpoints": [endpoint]}
    with pytest.raises(AssertionError, match="metricRelabelings"):
        jobs({"kind": "PodMonitor", "metadata": {"namespace": "n", "name": "m"}, "spec": spec})
