"""Nodes are drained with the real scheduler, eviction and budgets; of the pods there is nothing but their readiness."""

from __future__ import annotations

import json
import time
from typing import Any, Final

import pytest
from tests.platform.conftest import PLACED_SECONDS, Place
from tests.support import kubectl
from tests.support.kwok import FakeNodes
from tests.support.wait import until

pytestmark = pytest.mark.platform

Object = dict[str, Any]

SIZE: Final = 2
NAME: Final = "chat"
DRAIN_SECONDS: Final = 120


def evict(place: Place, pod: str) -> str:
    """As `kubectl drain` does; returns what the API server has against it."""
    path = f"/api/v1/namespaces/{place.namespace}/pods/{pod}/eviction"
    metadata = {"name": pod, "namespace": place.namespace}
    eviction = json.dumps({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata})
    try:
        place.plane.kubectl("create", "--raw", path, "-f", "-", stdin=eviction)
    except kubectl.KubectlError as error:
        return str(error)
    return ""


def whole(place: Place) -> set[int]:
    """Groups of which every pod is Ready and stays."""
    groups: list[int] = []
    for pod in place.pods(NAME):
        conditions = pod["status"].get("conditions", [])
        ready = any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)
        if ready and "deletionTimestamp" not in pod["metadata"]:
            groups.append(int(pod["metadata"]["labels"]["lockstep.dev/group"]))
    return {group for group in groups if groups.count(group) == SIZE}


def served(place: Place, nodes: FakeNodes, replicas: int) -> None:
    place.model(NAME, tensorParallelSize=SIZE, replicas=replicas, template={"spec": nodes.placement})
    until(f"{replicas} groups", lambda: whole(place) == {*range(replicas)}, PLACED_SECONDS, place.explain)

    def is_counted() -> bool:
        budget = place.api.find("poddisruptionbudgets", place.namespace, NAME)
        return bool(budget and budget.get("status", {}).get("currentHealthy") == replicas * SIZE)

    until("the budget to have counted them", is_counted, PLACED_SECONDS, place.explain)


def test_kubectl_drain_empties_a_node_of_an_only_group_that_another_stands_in_for(
    place: Place, nodes: FakeNodes
) -> None:
    names = nodes.add(2)
    served(place, nodes, replicas=1)
    (node, *_) = sorted(place.nodes(NAME)[0])
    assert "violate the pod's disruption budget" in evict(place, "chat-0-0"), "before anybody stands in"
    place.plane.kubectl("cordon", node)
    seen: list[set[int]] = []
    deadline = time.monotonic() + DRAIN_SECONDS
    while any(pod["spec"].get("nodeName") == node for pod in place.pods(NAME)) or whole(place) != {0}:
        seen.append(whole(place))
        assert time.monotonic() < deadline, place.explain()
        time.sleep(0.05)
    assert all(seen), "a whole group at every moment"
    assert {0, 1} in seen, "the other one was Ready before any pod went"
    assert place.nodes(NAME)[0] == set(names) - {node}
    place.plane.kubectl("drain", node, "--ignore-daemonsets", "--delete-emptydir-data", f"--timeout={DRAIN_SECONDS}s")
