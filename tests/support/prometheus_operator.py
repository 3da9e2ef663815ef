"""What the Prometheus operator makes of PodMonitors and ServiceMonitors: a job of Prometheus for each endpoint.

For the fields that the chart sets; any other is an error, so that none is overlooked. A contract test compares it with
what the operator's own tests expect. Sharding, which belongs to a Prometheus object, is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

Job = dict[str, Any]
Rule = dict[str, Any]

_META: Final = "__meta_kubernetes_"
_MONITOR: Final = frozenset({"selector", "namespaceSelector", "endpoints", "podMetricsEndpoints"})
_ENDPOINT: Final = frozenset({"port", "path", "interval", "honorLabels", "relabelings"})
_RELABELING: Final = {"sourceLabels": "source_labels", "targetLabel": "target_label"}


def jobs(monitor: Mapping[str, Any]) -> list[Job]:
    """The scrape configurations of one monitor."""
    spec, of_pods = monitor["spec"], monitor["kind"] == "PodMonitor"
    _known(spec, _MONITOR)
    endpoints = spec["podMetricsEndpoints" if of_pods else "endpoints"]
    return [_job(monitor, number, endpoint, of_pods) for number, endpoint in enumerate(endpoints)]


def _job(monitor: Mapping[str, Any], number: int, endpoint: Mapping[str, Any], of_pods: bool) -> Job:
    _known(endpoint, _ENDPOINT)
    namespace, name = monitor["metadata"]["namespace"], monitor["metadata"]["name"]
    found: Job = {"role": "pod" if of_pods else "endpoints"}
    if names := _namespaces(monitor["spec"].get("namespaceSelector") or {}, namespace):
        found["namespaces"] = {"names": names}
    targets = _of_pod if of_pods else _of_service
    return {
        "job_name": f"{'podMonitor' if of_pods else 'serviceMonitor'}/{namespace}/{name}/{number}",
        "honor_labels": endpoint.get("honorLabels", False),
        "kubernetes_sd_configs": [found],
        "scrape_interval": endpoint["interval"],
        "scrape_timeout": endpoint["interval"],
        "metrics_path": endpoint["path"],
        "relabel_configs": [
            {"source_labels": ["job"], "target_label": "__tmp_prometheus_job_name"},
            *targets(monitor, endpoint["port"]),
            {"target_label": "endpoint", "replacement": endpoint["port"]},
            *(_relabeling(rule) for rule in endpoint.get("relabelings", ())),
        ],
    }


def _relabeling(rule: Mapping[str, Any]) -> Rule:
    _known(rule, frozenset({"action", *_RELABELING}))
    return {_RELABELING.get(name, name): value for name, value in rule.items()}


def _of_pod(monitor: Mapping[str, Any], port: str) -> Iterator[Rule]:
    yield _running()
    yield from _selected("pod", monitor)
    yield _keep("pod_container_port_name", port)
    yield _named("namespace", "namespace")
    yield _named("pod_container_name", "container")
    yield _named("pod_name", "pod")
    metadata = monitor["metadata"]
    yield {"target_label": "job", "replacement": f"{metadata['namespace']}/{metadata['name']}"}


def _of_service(monitor: Mapping[str, Any], port: str) -> Iterator[Rule]:
    yield from _selected("service", monitor)
    yield _keep("endpoint_port_name", port)
    kinds = [f"{_META}endpoint_address_target_kind", f"{_META}endpoint_address_target_name"]
    for kind in ("Node", "Pod"):
        yield {"source_labels": kinds, "regex": f"{kind};(.*)", "replacement": "${1}", "target_label": kind.lower()}
    yield _named("namespace", "namespace")
    yield _named("service_name", "service")
    yield _named("pod_name", "pod")
    yield _named("pod_container_name", "container")
    yield _running()
    yield {**_named("service_name", "job"), "replacement": "${1}"}


def _selected(what: str, monitor: Mapping[str, Any]) -> Iterator[Rule]:
    _known(monitor["spec"]["selector"], frozenset({"matchLabels"}))
    for label, value in sorted(monitor["spec"]["selector"]["matchLabels"].items()):
        label = re.sub(r"\W", "_", label)
        sources = [f"{_META}{what}_label_{label}", f"{_META}{what}_labelpresent_{label}"]
        yield {"action": "keep", "source_labels": sources, "regex": f"({value});true"}


def _running() -> Rule:
    return {"action": "drop", "source_labels": [f"{_META}pod_phase"], "regex": "(Failed|Succeeded)"}


def _keep(source: str, value: str) -> Rule:
    return {"action": "keep", "source_labels": [_META + source], "regex": value}


def _named(source: str, target: str) -> Rule:
    return {"source_labels": [_META + source], "target_label": target}


def _namespaces(selector: Mapping[str, Any], own: str) -> list[str]:
    """Empty: all."""
    _known(selector, frozenset({"any", "matchNames"}))
    if selector.get("any"):
        return []
    return list(selector.get("matchNames") or [own])


def _known(block: Mapping[str, Any], fields: frozenset[str]) -> None:
    assert block.keys() <= fields, f"nobody has translated {sorted(block.keys() - fields)}"
