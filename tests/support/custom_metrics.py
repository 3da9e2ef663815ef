"""The custom metrics API as Prometheus Adapter serves it, from the leaders' own /metrics instead of a Prometheus.

Kubernetes' autoscaler finds it by an APIService, through the API server, as it would find the other. It listens on the
node, which the embedded cluster's pods and API server reach.
"""

from __future__ import annotations

import json
import re
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

import httpx
from dev.cluster.layout import KUBERNETES, NODE_ADDRESS
from prometheus_client.parser import text_string_to_metric_families
from tests.support import kubectl
from tests.support.cluster_api import ClusterApi
from tests.support.http import HTTP
from tests.support.wait import until

GROUP: Final = "custom.metrics.k8s.io"
VERSION: Final = "v1beta2"
AVAILABLE_SECONDS: Final = 60.0
_METRIC: Final = re.compile(rf"/apis/{GROUP}/{VERSION}/namespaces/([^/]+)/pods/\*/(\w+)")

Object = dict[str, Any]


@contextmanager
def custom_metrics(api: ClusterApi, namespace: str, folder: Path) -> Iterator[None]:
    """Until the end, the cluster has the API; `namespace` is for the Service in front of it."""
    server = ThreadingHTTPServer((NODE_ADDRESS, 0), _handler(api))
    server.socket = _context(folder).wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        kubectl.apply_all(_objects(namespace, server.server_port))
        until("the custom metrics API", _is_available, AVAILABLE_SECONDS)
        yield
    finally:
        kubectl.kubectl("delete", "apiservice", f"{VERSION}.{GROUP}", "--ignore-not-found")
        server.shutdown()
        thread.join()
        server.server_close()


def values(api: ClusterApi, namespace: str, selector: str, metric: str) -> list[Object]:
    """A MetricValue for each pod that has the metric; a pod that can't be scraped has none."""
    found = []
    for pod in api.items("pods", namespace, selector):
        value = _gauge(pod.get("status", {}).get("podIP"), metric)
        if value is not None:
            name = pod["metadata"]["name"]
            about = {"kind": "Pod", "namespace": namespace, "name": name, "apiVersion": "/v1"}
            now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            quantity = f"{round(value * 1000)}m"
            found.append({"describedObject": about, "metric": {"name": metric}, "timestamp": now, "value": quantity})
    return found


def _gauge(address: str | None, metric: str) -> float | None:
    if not address:
        return None
    try:
        page = HTTP.get(f"http://{address}:8000/metrics", timeout=5).text
    except httpx.TransportError:
        return None
    samples = (sample for family in text_string_to_metric_families(page) for sample in family.samples)
    return next((sample.value for sample in samples if sample.name == metric), None)


def _handler(api: ClusterApi) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            address = urlsplit(self.path)
            if wanted := _METRIC.fullmatch(unquote(address.path)):
                selector = parse_qs(address.query).get("labelSelector", [""])[0]
                items = values(api, wanted[1], selector, wanted[2])
                self._answer(200, {"kind": "MetricValueList", "metadata": {}, "items": items})
            elif address.path.rstrip("/") == f"/apis/{GROUP}/{VERSION}":
                self._answer(200, {"kind": "APIResourceList", "groupVersion": f"{GROUP}/{VERSION}", "resources": []})
            else:
                self._answer(404, {"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404})

        def _answer(self, code: int, body: Object) -> None:
            version = f"{GROUP}/{VERSION}" if body["kind"] == "MetricValueList" else "v1"
            content = json.dumps({"apiVersion": version, **body}).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """The API server asks often."""

    return Handler


def _context(folder: Path) -> ssl.SSLContext:
    certificates = folder / "certificates"
    command = [str(KUBERNETES), "pki", str(certificates), f"adapter=adapter@{NODE_ADDRESS}"]
    subprocess.run(command, check=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "adapter.crt", certificates / "adapter.key")
    return context


def _objects(namespace: str, port: int) -> list[Object]:
    name = "custom-metrics"
    metadata = {"namespace": namespace, "name": name}
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {"ports": [{"name": "https", "port": 443}]},
        },
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {**metadata, "labels": {"kubernetes.io/service-name": name}},
            "addressType": "IPv4",
            "ports": [{"name": "https", "port": port, "protocol": "TCP"}],
            "endpoints": [{"addresses": [NODE_ADDRESS], "conditions": {"ready": True}}],
        },
        {
            "apiVersion": "apiregistration.k8s.io/v1",
            "kind": "APIService",
            "metadata": {"name": f"{VERSION}.{GROUP}"},
            "spec": {
                "group": GROUP,
                "version": VERSION,
                "groupPriorityMinimum": 100,
                "versionPriority": 100,
                "insecureSkipTLSVerify": True,
                "service": {"namespace": namespace, "name": name, "port": 443},
            },
        },
    ]


def _is_available() -> bool:
    found = kubectl.get("apiservice", f"{VERSION}.{GROUP}")
    conditions = found.get("status", {}).get("conditions", [])
    return any(one["type"] == "Available" and one["status"] == "True" for one in conditions)
