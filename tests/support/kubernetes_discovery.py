"""What Prometheus' discovery by the Kubernetes API finds, as files of targets: Debian's Prometheus is built without it.

The roles and labels are those of Prometheus' documentation that monitors use. The targets are those of the moment.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from tests.support import kubectl

Object = Mapping[str, Any]
Labels = dict[str, str]

_META: Final = "__meta_kubernetes_"


def discovered(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The same job, with the targets that its Kubernetes discovery finds now."""
    (discovery,) = job["kubernetes_sd_configs"]
    file = folder / f"{job['job_name'].replace('/', '-')}.json"
    file.write_text(json.dumps([{"targets": [address], "labels": labels} for address, labels in _targets(discovery)]))
    others = {name: value for name, value in job.items() if name != "kubernetes_sd_configs"}
    return {**others, "file_sd_configs": [{"files": [str(file)]}]}


def _targets(discovery: Mapping[str, Any]) -> Iterator[tuple[str, Labels]]:
    namespaces = (discovery.get("namespaces") or {}).get("names")
    pods = [pod for pod in _list("pods", namespaces) if pod.get("status", {}).get("podIP")]
    if discovery["role"] == "pod":
        for pod in pods:
            yield from _of_pod(pod)
    else:
        assert discovery["role"] == "endpoints", f"nobody has written role {discovery['role']}"
        by_name = {(pod["metadata"]["namespace"], pod["metadata"]["name"]): pod for pod in pods}
        services = {_key(service): service for service in _list("services", namespaces)}
        for endpoints in _list("endpoints", namespaces):
            yield from _of_endpoints(endpoints, services.get(_key(endpoints)), by_name)


def _of_pod(pod: Object) -> Iterator[tuple[str, Labels]]:
    """One for each port of each container."""
    for container in pod["spec"]["containers"]:
        for port in container.get("ports", ()):
            address = f"{pod['status']['podIP']}:{port['containerPort']}"
            yield address, {**_pod_labels(pod), **_port_labels(container, port)}


def _of_endpoints(
    endpoints: Object, service: Object | None, pods: Mapping[tuple[str, str], Object]
) -> Iterator[tuple[str, Labels]]:
    namespace = endpoints["metadata"]["namespace"]
    shared = {f"{_META}namespace": namespace, **(_meta("service", service) if service else {})}
    for subset in endpoints.get("subsets") or ():
        for port in subset.get("ports", ()):
            for address in subset.get("addresses", ()):
                target = address.get("targetRef") or {}
                labels = {
                    **shared,
                    f"{_META}endpoint_port_name": port.get("name", ""),
                    f"{_META}endpoint_address_target_kind": target.get("kind", ""),
                    f"{_META}endpoint_address_target_name": target.get("name", ""),
                }
                if pod := pods.get((namespace, target.get("name", ""))):
                    labels |= {**_pod_labels(pod), **_port_of(pod, port["port"])}
                yield f"{address['ip']}:{port['port']}", labels


def _port_of(pod: Object, number: int) -> Labels:
    ports = [(one, port) for one in pod["spec"]["containers"] for port in one.get("ports", ())]
    return next((_port_labels(one, port) for one, port in ports if port["containerPort"] == number), {})


def _pod_labels(pod: Object) -> Labels:
    phase = {f"{_META}pod_phase": pod["status"].get("phase", "")}
    return {f"{_META}namespace": pod["metadata"]["namespace"], **phase, **_meta("pod", pod)}


def _port_labels(container: Object, port: Object) -> Labels:
    name, number = port.get("name", ""), str(port["containerPort"])
    return {
        f"{_META}pod_container_name": container["name"],
        f"{_META}pod_container_port_name": name,
        f"{_META}pod_container_port_number": number,
    }


def _meta(role: str, found: Object) -> Labels:
    labels = {re.sub(r"\W", "_", name): value for name, value in (found["metadata"].get("labels") or {}).items()}
    return {
        f"{_META}{role}_name": found["metadata"]["name"],
        **{f"{_META}{role}_label_{name}": value for name, value in labels.items()},
        **{f"{_META}{role}_labelpresent_{name}": "true" for name in labels},
    }


def _list(plural: str, namespaces: list[str] | None) -> list[Object]:
    scopes = [("--namespace", name) for name in namespaces] if namespaces else [("--all-namespaces",)]
    return [one for scope in scopes for one in kubectl.get(plural, *scope)["items"]]


def _key(found: Object) -> tuple[str, str]:
    return found["metadata"]["namespace"], found["metadata"]["name"]
