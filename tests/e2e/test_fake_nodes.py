"""Fake nodes are nodes to the scheduler and to controllers, and leave the real one alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from tests.support import kubectl
from tests.support.cluster_api import ClusterApi
from tests.support.kwok import FakeNodes, fake_nodes
from tests.support.wait import until

Object = dict[str, Any]

ACCELERATOR: Final = "example.com/gpu"
PODS_SECONDS: Final = 60.0


@pytest.fixture
def nodes(api: ClusterApi, tmp_path: Path) -> Iterator[FakeNodes]:
    with fake_nodes(api, tmp_path) as nodes:
        yield nodes


def pods_of_eight(nodes: FakeNodes, namespace: str, replicas: int) -> Object:
    container = {"name": "rank", "image": "nowhere/none:1", "resources": {"limits": {ACCELERATOR: "8"}}}
    labels = {"app": "ranks"}
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"namespace": namespace, "name": "ranks"},
        "spec": {
            "replicas": replicas,
            "serviceName": "ranks",
            "podManagementPolicy": "Parallel",
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {**nodes.placement, "containers": [container]}},
        },
    }


def is_ready(pod: Object) -> bool:
    return any(one["type"] == "Ready" and one["status"] == "True" for one in pod["status"].get("conditions", []))


def test_pods_are_placed_on_fake_nodes_by_what_these_have(api: ClusterApi, namespace: str, nodes: FakeNodes) -> None:
    names = nodes.add(2, resources={ACCELERATOR: "8"}, labels={"rack": "a"})
    kubectl.apply(pods_of_eight(nodes, namespace, replicas=3))

    def pods() -> list[Object]:
        return api.items("pods", namespace)

    def two_run() -> bool:
        return sum(map(is_ready, pods())) == 2 and any("conditions" in pod["status"] for pod in waiting())

    def waiting() -> list[Object]:
        return [pod for pod in pods() if not pod["spec"].get("nodeName")]

    until("two pods to be Ready", two_run, PODS_SECONDS, lambda: kubectl.kubectl("-n", namespace, "describe", "pods"))
    ready = [pod for pod in pods() if is_ready(pod)]
    assert {pod["spec"]["nodeName"] for pod in ready} == set(names)
    assert len({pod["status"]["podIP"] for pod in ready}) == 2
    assert [one["reason"] for one in waiting()[0]["status"]["conditions"]] == ["Unschedulable"]

    deleted = ready[0]["metadata"]
    kubectl.kubectl("-n", namespace, "delete", "pod", deleted["name"], "--wait=false")

    def another_runs() -> bool:
        uids = {pod["metadata"]["uid"] for pod in pods() if is_ready(pod)}
        return len(uids) == 2 and deleted["uid"] not in uids

    until("another pod to take its place", another_runs, PODS_SECONDS)

    nodes.remove_all()
    assert nodes.pods() == []
