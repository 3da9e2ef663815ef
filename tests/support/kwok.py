"""Nodes and pods that exist in the API server alone: kwok (sigs.k8s.io/kwok) answers for their kubelets.

Scheduler, controllers and the API server treat them as any others; no container runs. The nodes' label is this
object's alone, so the real node and other tests' fake ones are never touched, and a taint keeps other pods away.
"""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tests.support import kubectl
from tests.support.cluster_api import ClusterApi
from tests.support.wait import until

Object = dict[str, Any]

PROGRAM: Final = kubectl.ROOT / ".dev" / "bin" / "kwok"
LABEL: Final = "lockstep.test/kwok"
TAINT: Final = "kwok.x-k8s.io/node"
POD_CIDR: Final = "10.178.0.1/16"  # beyond what the embedded cluster uses; nothing answers there
RESOURCES: Final = {"cpu": "64", "memory": "512Gi", "pods": "500"}
LEASE_SECONDS: Final = 40
READY_SECONDS: Final = 60.0
END_SECONDS: Final = 10.0


class FakeNodes:
    """Safe for use from one thread. Made by `fake_nodes`."""

    def __init__(self, api: ClusterApi, kubeconfig: Path, label: str = "") -> None:
        self._api = api
        self._cluster = f"--kubeconfig={kubeconfig}"
        self.label = label or f"n{secrets.token_hex(3)}"  # digits with an e among them are a number to YAML
        self.names: list[str] = []

    @property
    def selector(self) -> str:
        return f"{LABEL}={self.label}"

    @property
    def placement(self) -> Object:
        """For a pod's spec: these nodes and no others."""
        return {
            "nodeSelector": {LABEL: self.label},
            "tolerations": [{"key": TAINT, "operator": "Exists", "effect": "NoSchedule"}],
        }

    def add(
        self, count: int, resources: Mapping[str, str] | None = None, labels: Mapping[str, str] | None = None
    ) -> list[str]:
        """Names of new nodes, which are Ready and without the node controller's taints. `resources` are laid over
        RESOURCES."""
        names = [f"kwok-{self.label}-{len(self.names) + number}" for number in range(count)]
        manifests = (self._manifest(name, {**RESOURCES, **(resources or {})}, labels or {}) for name in names)
        kubectl.apply_all(manifests, self._cluster)
        self.names += names
        until("the fake nodes to be Ready", lambda: all(map(self._ready, names)), READY_SECONDS, self._explain)
        return names

    def remove_all(self) -> None:
        """The nodes, and every pod that was bound to one."""
        kubectl.kubectl(self._cluster, "delete", "nodes", "--selector", self.selector, "--wait=false")
        for pod in self.pods():
            metadata = pod["metadata"]
            force = ("--force", "--grace-period=0", "--wait=false", "--ignore-not-found")
            kubectl.kubectl(
                self._cluster, "--namespace", metadata["namespace"], "delete", "pod", metadata["name"], *force
            )

    def pods(self) -> list[Object]:
        """Of all namespaces, that are bound to one of these nodes."""
        names = set(self.names)
        return [pod for pod in self._api.everywhere("pods") if pod["spec"].get("nodeName") in names]

    def _manifest(self, name: str, resources: Mapping[str, str], labels: Mapping[str, str]) -> Object:
        own = {LABEL: self.label, "kubernetes.io/hostname": name, "type": "kwok"}
        return {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name, "labels": {**own, **labels}},
            "spec": {"taints": [{"key": TAINT, "value": "fake", "effect": "NoSchedule"}]},
            "status": {"allocatable": dict(resources), "capacity": dict(resources)},
        }

    def _ready(self, name: str) -> bool:
        node = self._api.node(name)
        conditions = {one["type"]: one["status"] for one in node.get("status", {}).get("conditions", [])}
        taints = {taint["key"] for taint in node["spec"].get("taints", [])}
        return conditions.get("Ready") == "True" and taints == {TAINT}

    def _explain(self) -> str:
        return kubectl.kubectl(self._cluster, "describe", "nodes", "--selector", self.selector)


@contextmanager
def fake_nodes(
    api: ClusterApi,
    folder: Path,
    pod_cidr: str = POD_CIDR,
    kubeconfig: Path = kubectl.KUBECONFIG,
    *,
    tidy: bool = True,
    label: str = "",
) -> Iterator[FakeNodes]:
    """A kwok for as long as the context; `folder` keeps its log. At the end nodes and their pods are gone, unless the
    whole cluster goes with them (`tidy` is false). `label` tells those of one cluster apart; without one it is new.

    `api` and `kubeconfig` are of the same cluster.
    """
    assert PROGRAM.exists(), "there is no kwok: run `make .dev/bin/kwok`"
    nodes = FakeNodes(api, kubeconfig, label)
    command = [
        str(PROGRAM), f"--kubeconfig={kubeconfig}", f"--manage-nodes-with-label-selector={nodes.selector}",
        f"--node-lease-duration-seconds={LEASE_SECONDS}", f"--cidr={pod_cidr}", "--node-port=0",
    ]  # fmt: skip
    with (folder / "kwok.log").open("ab") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            yield nodes
        finally:
            try:
                if nodes.names and tidy:
                    nodes.remove_all()
            finally:
                process.terminate()
                process.wait(END_SECONDS)
