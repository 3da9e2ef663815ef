"""Kueue (sigs.k8s.io/kueue) on a cluster of a test's own: its controllers and webhooks as a process of this machine.

Its chart's objects are applied but for the Deployment. The webhooks' Service leads to this machine, and what a kubelet
does with the Secret of its certificate is done here.
"""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import yaml
from dev.cluster import toolchain
from dev.go_tool import TOOLS
from tests.support import kubectl
from tests.support.control_plane import ControlPlane
from tests.support.http import HTTP
from tests.support.ports import free_port
from tests.support.wait import until

Object = dict[str, Any]

PROGRAM: Final = kubectl.ROOT / ".dev" / "bin" / "kueue"
HELM: Final = kubectl.ROOT / ".dev" / "bin" / "helm"
MODULE: Final = "sigs.k8s.io/kueue"
NAMESPACE: Final = "kueue-system"
SECRET: Final = "kueue-webhook-server-cert"
APPLIED: Final = (
    "CustomResourceDefinition", "Secret", "MutatingWebhookConfiguration", "ValidatingWebhookConfiguration",
)  # fmt: skip
UP_SECONDS: Final = 120.0


@contextmanager
def kueue(plane: ControlPlane) -> Iterator[None]:
    """Once it admits StatefulSets with a queue's label."""
    assert PROGRAM.exists(), "there is no kueue: run `make .dev/bin/kueue`"
    port, health, certificates = free_port(), free_port(), plane.folder / "kueue"
    certificates.mkdir()
    configuration = plane.folder / "kueue.yaml"
    configuration.write_text(yaml.safe_dump(_configuration(port, health, certificates)))
    plane.kubectl("create", "namespace", NAMESPACE)
    plane.apply(_service(), *(_leading_to(port, document) for document in _chart() if document["kind"] in APPLIED))
    options = [
        f"--config={configuration}",
        f"--kubeconfig={plane.kubeconfig}",
        "--feature-gates=VisibilityOnDemand=false",
    ]
    with plane.running("kueue", str(PROGRAM), *options):
        until("Kueue's certificate", lambda: _mounted(plane, certificates), UP_SECONDS, lambda: plane.log("kueue"))
        until("Kueue to serve", lambda: _is_ready(health), UP_SECONDS, lambda: plane.log("kueue"))
        yield


def queue(namespace: str, quotas: Object) -> list[Object]:
    """The LocalQueue `gpus` of the namespace; `quotas` by resource."""
    resources = [{"name": name, "nominalQuota": quota} for name, quota in quotas.items()]
    group = {"coveredResources": list(quotas), "flavors": [{"name": "any", "resources": resources}]}
    version = {"apiVersion": "kueue.x-k8s.io/v1beta2"}
    return [
        version | {"kind": "ResourceFlavor", "metadata": {"name": "any"}},
        version
        | {
            "kind": "ClusterQueue",
            "metadata": {"name": "all"},
            "spec": {"namespaceSelector": {}, "resourceGroups": [group]},
        },
        version
        | {
            "kind": "LocalQueue",
            "metadata": {"name": "gpus", "namespace": namespace},
            "spec": {"clusterQueue": "all"},
        },
    ]


def _chart() -> list[Object]:
    folder = Path(_go("mod", "download", "-json", MODULE)["Dir"])
    command = [str(HELM), "template", "kueue", str(folder / "charts" / "kueue"), f"--namespace={NAMESPACE}"]
    rendered = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return [document for document in yaml.safe_load_all(rendered) if document]


def _go(*arguments: str) -> Object:
    go = toolchain.find_go() or toolchain.install_go()
    output = subprocess.run([go, *arguments], cwd=TOOLS / "kueue", capture_output=True, check=True, timeout=120).stdout
    found: Object = json.loads(output)
    return found


def _configuration(port: int, health: int, certificates: Path) -> Object:
    return {
        "apiVersion": "config.kueue.x-k8s.io/v1beta2",
        "kind": "Configuration",
        "namespace": NAMESPACE,
        "health": {"healthProbeBindAddress": f"127.0.0.1:{health}"},
        "metrics": {"bindAddress": "0"},
        "webhook": {"host": "127.0.0.1", "port": port, "certDir": str(certificates)},
        "leaderElection": {"leaderElect": False},
        "integrations": {"frameworks": ["pod", "statefulset"]},
    }


def _service() -> Object:
    """The API server calls webhooks by their Service, whose name is in the certificate."""
    metadata = {"name": "kueue-webhook-service", "namespace": NAMESPACE}
    spec = {"type": "ExternalName", "externalName": "localhost"}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}


def _leading_to(port: int, document: Object) -> Object:
    """The same, with every webhook at this port of the Service."""
    conversion = document.get("spec", {}).get("conversion", {}).get("webhook")
    for webhook in [*document.get("webhooks", []), *([conversion] if conversion else [])]:
        webhook["clientConfig"]["service"]["port"] = port
    return document


def _mounted(plane: ControlPlane, folder: Path) -> bool:
    data = plane.get("secret", SECRET, f"--namespace={NAMESPACE}").get("data", {})
    for name in ("tls.crt", "tls.key"):
        if name not in data:
            return False
        (folder / name).write_bytes(base64.b64decode(data[name]))
    return True


def _is_ready(port: int) -> bool:
    try:
        return HTTP.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
    except httpx.TransportError:
        return False
