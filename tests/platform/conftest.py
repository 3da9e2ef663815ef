"""A Kubernetes of the tests' own, with Kueue, kwok's nodes and the operator; a namespace of its own for each test."""

from __future__ import annotations

import re
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import yaml
from tests.support.chart import CRD_SOURCE
from tests.support.cluster_api import ClusterApi
from tests.support.cluster_model import manifest
from tests.support.control_plane import ControlPlane, control_plane
from tests.support.http import HTTP
from tests.support.kueue import kueue
from tests.support.kwok import FakeNodes, fake_nodes
from tests.support.ports import free_port
from tests.support.wait import until

Object = dict[str, Any]

GPU: Final = "example.com/gpu"
RESYNC_SECONDS: Final = 3
PASSES: Final = 4  # of the operator, after which it has had its chance
UP_SECONDS: Final = 60.0
PLACED_SECONDS: Final = 90.0
GONE_SECONDS: Final = 90.0
REST_SECONDS: Final = 90.0


@dataclass(frozen=True, slots=True)
class Place:
    """A namespace, and what is in it."""

    plane: ControlPlane
    api: ClusterApi
    operator: str  # the URL of its metrics
    namespace: str

    def model(self, *names: str, labels: Object | None = None, **spec: Any) -> None:
        """One or several at once, of no size to speak of unless `spec` says so: no rank will ever run."""
        model = {"model": {"hostPath": {"path": "/models/none"}}, "tensorParallelSize": 1}
        documents = [manifest(self.namespace, name, model | spec) for name in names]
        for document in documents:
            document["metadata"]["labels"] = labels or {}
        self.plane.apply(*documents)

    def delete(self, *names: str) -> None:
        """The models, their pods, and what their groups held in a queue."""
        self.plane.kubectl(f"--namespace={self.namespace}", "delete", "tpm", *names)
        until(f"all of {', '.join(names)} to be gone", lambda: self._is_free_of(names), GONE_SECONDS, self.explain)

    def delete_all(self) -> None:
        if models := self.api.items("tensorparallelmodels", self.namespace):
            self.delete(*(model["metadata"]["name"] for model in models))

    def _is_free_of(self, names: tuple[str, ...]) -> bool:
        selector = f"lockstep.dev/model in ({','.join(names)})"
        if any(self.api.items(kind, self.namespace, selector) for kind in ("statefulsets", "pods")):
            return False
        return not self.plane.get("workloads.kueue.x-k8s.io", f"--namespace={self.namespace}")["items"]

    def pods(self, name: str) -> list[Object]:
        return self.api.items("pods", self.namespace, f"lockstep.dev/model={name}")

    def nodes(self, name: str) -> dict[int, set[str]]:
        """Of the placed pods of each group that has any."""
        found: dict[int, set[str]] = {}
        for pod in self.pods(name):
            if node := pod["spec"].get("nodeName"):
                found.setdefault(int(pod["metadata"]["labels"]["lockstep.dev/group"]), set()).add(node)
        return found

    def why_waiting(self, name: str) -> list[str]:
        """The scheduler's or the gates' word on each pod that has no node; empty while one has heard nothing."""
        waiting = [pod for pod in self.pods(name) if not pod["spec"].get("nodeName")]
        told = [
            one["reason"]
            for pod in waiting
            for one in pod["status"].get("conditions", [])
            if one["type"] == "PodScheduled"
        ]
        return told if len(told) == len(waiting) else []

    def condition(self, name: str, kind: str = "Ready") -> Object:
        model = self.api.find("tensorparallelmodels", self.namespace, name)
        assert model is not None
        return next((one for one in model.get("status", {}).get("conditions", []) if one["type"] == kind), {})

    def uids(self, kind: str, name: str) -> dict[str, str]:
        items = self.api.items(kind, self.namespace, f"lockstep.dev/model={name}")
        return {item["metadata"]["name"]: item["metadata"]["uid"] for item in items}

    def until_at_rest(self) -> None:
        """The operator passes over what there is some times in a row, and writes nothing."""
        writes, passes = self._count("writes"), self._count("reconciles")

        def rests() -> bool:
            nonlocal writes, passes
            if self._count("writes") != writes:
                writes, passes = self._count("writes"), self._count("reconciles")
            return self._count("reconciles") >= passes + PASSES

        until(f"{PASSES} passes of the operator without a write", rests, REST_SECONDS, self.explain)

    def _count(self, counter: str) -> float:
        text = HTTP.get(f"{self.operator}/metrics").text
        return sum(float(value) for value in re.findall(rf"^lockstep_operator_{counter}_total\S* (\S+)$", text, re.M))

    def explain(self) -> str:
        shown = ("tpm,statefulsets,pods,events", f"--namespace={self.namespace}", "--output=wide")
        return self.plane.kubectl("get", *shown) + self.plane.log("operator") + self.plane.log("kueue")


@pytest.fixture(scope="session")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    with control_plane(tmp_path_factory.mktemp("plane")) as plane, kueue(plane):
        plane.apply(yaml.safe_load(CRD_SOURCE.read_text()))
        yield plane


@pytest.fixture(scope="session")
def operator(plane: ControlPlane) -> Iterator[str]:
    port = free_port()
    variables = {
        "KUBECONFIG": str(plane.kubeconfig),
        "LOCKSTEP_RUNTIME_IMAGE": "nowhere/none:1",
        "LOCKSTEP_RESYNC_SECONDS": str(RESYNC_SECONDS),
        "LOCKSTEP_PORT": str(port),
        "LOCKSTEP_WATCH_NODES": "true",
    }
    url = f"http://127.0.0.1:{port}"
    with plane.running("operator", sys.executable, "-m", "lockstep_operator", **variables) as process:

        def is_up() -> bool:
            assert process.poll() is None, plane.log("operator")
            return _is_ready(url)

        until("the operator", is_up, UP_SECONDS, lambda: plane.log("operator"))
        yield url


@pytest.fixture
def place(plane: ControlPlane, operator: str) -> Iterator[Place]:
    namespace, api = f"platform-{secrets.token_hex(3)}", ClusterApi(plane.kubeconfig)
    plane.kubectl("create", "namespace", namespace)
    yield Place(plane, api, operator, namespace)
    plane.kubectl("delete", "namespace", namespace, "--wait=false")
    api.close()


@pytest.fixture
def nodes(place: Place, tmp_path: Path) -> Iterator[FakeNodes]:
    with fake_nodes(place.api, tmp_path, kubeconfig=place.plane.kubeconfig) as nodes:
        yield nodes
        place.delete_all()  # while somebody still ends the pods: what they hold in a queue, other tests need


def _is_ready(url: str) -> bool:
    try:
        return HTTP.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False
