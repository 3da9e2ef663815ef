"""Kueue (sigs.k8s.io/kueue) on a cluster of a test's own: its controllers and webhooks as a process of this machine.

See `webhooked` for how.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import yaml
from tests.support.control_plane import ControlPlane
from tests.support.http import HTTP
from tests.support.ports import free_port
from tests.support.wait import until
from tests.support.webhooked import Webhooked

Object = dict[str, Any]

KUEUE: Final = Webhooked(
    "kueue", "sigs.k8s.io/kueue", "kueue-system", "kueue-webhook-server-cert", "kueue-webhook-service"
)
APPLIED: Final = (
    "CustomResourceDefinition", "Secret", "MutatingWebhookConfiguration", "ValidatingWebhookConfiguration",
)  # fmt: skip
UP_SECONDS: Final = 120.0


@contextmanager
def kueue(plane: ControlPlane) -> Iterator[None]:
    """Once it admits StatefulSets with a queue's label."""
    assert KUEUE.program.exists(), "there is no kueue: run `make .dev/bin/kueue`"
    port, health, certificates = free_port(), free_port(), plane.folder / "kueue"
    certificates.mkdir()
    configuration = plane.folder / "kueue.yaml"
    configuration.write_text(yaml.safe_dump(_configuration(port, health, certificates)))
    KUEUE.install(plane, APPLIED, port)
    options = [
        f"--config={configuration}",
        f"--kubeconfig={plane.kubeconfig}",
        "--feature-gates=VisibilityOnDemand=false",
    ]
    with plane.running("kueue", str(KUEUE.program), *options):
        until("Kueue's certificate", lambda: KUEUE.mounted(plane, certificates), UP_SECONDS, lambda: plane.log("kueue"))
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


def _configuration(port: int, health: int, certificates: Path) -> Object:
    return {
        "apiVersion": "config.kueue.x-k8s.io/v1beta2",
        "kind": "Configuration",
        "namespace": KUEUE.namespace,
        "health": {"healthProbeBindAddress": f"127.0.0.1:{health}"},
        "metrics": {"bindAddress": "0"},
        "webhook": {"host": "127.0.0.1", "port": port, "certDir": str(certificates)},
        "leaderElection": {"leaderElect": False},
        "integrations": {"frameworks": ["pod", "statefulset"]},
    }


def _is_ready(port: int) -> bool:
    try:
        return HTTP.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
    except httpx.TransportError:
        return False
