"""LeaderWorkerSet's controller (sigs.k8s.io/lws) with as many sets of as many pods, on the same cluster."""

from __future__ import annotations

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

import httpx
import yaml
from bench.scale_models import NAMESPACES, RANKS, administrator
from bench.scale_scene import PEERS_ACCOUNT, Program
from tests.support.control_plane import ControlPlane
from tests.support.ports import free_port
from tests.support.wait import until
from tests.support.webhooked import Webhooked

Object = dict[str, Any]

LWS: Final = Webhooked("lws", "sigs.k8s.io/lws", "lws-system", "lws-webhook-server-cert", "lws-webhook-service")
PATH: Final = "/apis/leaderworkerset.x-k8s.io/v1"
PLURAL: Final = "leaderworkersets"
APPLIED: Final = (
    "CustomResourceDefinition", "Secret", "MutatingWebhookConfiguration", "ValidatingWebhookConfiguration",
    "ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding",
)  # fmt: skip
UP_SECONDS: Final = 180.0


def worker_set(number: int, placement: Mapping[str, Any]) -> Object:
    pod = {**placement, "containers": [{"name": "worker", "image": "worker:1"}]}
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": {"namespace": f"bench-{number % NAMESPACES}", "name": f"w{number}"},
        "spec": {"replicas": 1, "leaderWorkerTemplate": {"size": RANKS, "workerTemplate": {"spec": pod}}},
    }


class Peer(Program):
    """The controller. Its chart's objects are there before, once."""

    def __init__(self, plane: ControlPlane) -> None:
        self._webhooks, self._metrics, self._health = free_port(), free_port(), free_port()
        if "lws-system" not in plane.kubectl("get", "namespaces"):
            LWS.install(plane, APPLIED, self._webhooks)
            reader = ("--clusterrole=lws-metrics-reader", "--serviceaccount=lws-system:lws-controller-manager")
            plane.kubectl("create", "clusterrolebinding", "bench-metrics", *reader)
        super().__init__(plane, "lws", PEERS_ACCOUNT)
        self._certificates = plane.folder / "lws"
        self._certificates.mkdir(exist_ok=True)
        self._configuration = plane.folder / "lws.yaml"
        self._configuration.write_text(yaml.safe_dump(self._settings()))

    def start(self) -> None:
        self.run(
            str(LWS.program), f"--config={self._configuration}", f"--kubeconfig={self._kubeconfig}",
            "--zap-log-level=error",
        )  # fmt: skip
        until("its certificate", lambda: LWS.mounted(self.plane, self._certificates), UP_SECONDS, self.explain)
        until("its webhooks", self._admits, UP_SECONDS, self.explain)

    def sync_count(self) -> int:
        """Sets that it has looked at since its start, once nothing waits any more; 0 before."""
        text = self._measured()
        waiting = _sums(text, "workqueue_depth", "name") or {"": 1.0}
        looks = _sums(text, "controller_runtime_reconcile_total", "controller")
        return 0 if any(waiting.values()) else int(looks.get("leaderworkerset", 0))

    def explain(self) -> str:
        return self.plane.log(self.name)

    def _admits(self) -> bool:
        with administrator(self.plane) as http:
            path = f"{PATH}/namespaces/default/{PLURAL}"
            tried = {**worker_set(0, {}), "metadata": {"namespace": "default", "name": "tried"}}
            return http.post(path, params={"dryRun": "All"}, json=tried).status_code == HTTPStatus.CREATED

    def _measured(self) -> str:
        url, headers = f"https://127.0.0.1:{self._metrics}/metrics", {"Authorization": f"Bearer {self._token}"}
        try:
            return httpx.get(url, headers=headers, verify=False, timeout=20, trust_env=False).text
        except httpx.TransportError:
            return ""

    def _settings(self) -> Object:
        return {
            "apiVersion": "config.lws.x-k8s.io/v1alpha1",
            "kind": "Configuration",
            "health": {"healthProbeBindAddress": f"127.0.0.1:{self._health}"},
            "metrics": {"bindAddress": f"127.0.0.1:{self._metrics}"},
            "webhook": {"host": "127.0.0.1", "port": self._webhooks, "certDir": str(self._certificates)},
            "leaderElection": {"leaderElect": False},
            "internalCertManagement": {"enable": True},
        }


def _sums(text: str, metric: str, label: str) -> dict[str, float]:
    """By the label's value."""
    found: dict[str, float] = {}
    for labels, value in re.findall(rf"^{metric}\{{(.*)\}} (\S+)$", text, re.MULTILINE):
        name = re.search(rf'\b{label}="([^"]*)"', labels)
        found[name[1] if name else ""] = found.get(name[1] if name else "", 0.0) + float(value)
    return found


def available(plane: ControlPlane) -> int:
    """Sets that are."""
    with administrator(plane) as http:
        items = http.get(f"{PATH}/{PLURAL}").raise_for_status().json()["items"]
    return sum("Available" in _true(item.get("status", {}).get("conditions", [])) for item in items)


def _true(conditions: list[Object]) -> set[str]:
    return {one["type"] for one in conditions if one["status"] == "True"}
