"""Nodes are drained under clients that ask on: a group goes as one, and an only one when another stands in for it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
from tests.support import kubectl
from tests.support.cluster_api import ClusterApi
from tests.support.cluster_load import Load
from tests.support.cluster_model import Model, Object, tiny_chat
from tests.support.kwok import FakeNodes, fake_nodes

SAMPLES_SECONDS: Final = 0.1
MOVED_SECONDS: Final = 120.0


@pytest.fixture(scope="module")
def pair(api: ClusterApi, new_namespace: Callable[[str], str]) -> Iterator[Model]:
    """Two groups of two pods."""
    model = Model(api, new_namespace("drained"), "chat")
    model.apply(tiny_chat(replicas=2))
    model.until_serving(2)
    yield model
    model.delete()


def evict(model: Model, pod: str) -> str:
    """As `kubectl drain` does; returns what the API server has against it."""
    path = f"/api/v1/namespaces/{model.namespace}/pods/{pod}/eviction"
    metadata = {"name": pod, "namespace": model.namespace}
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata}
    answer = kubectl.attempt("create", "--raw", path, "-f", "-", stdin=json.dumps(eviction))
    return answer.stderr if answer.returncode else ""


def uids(model: Model) -> set[str]:
    """Of its pods, but for those that are going."""
    return {pod["metadata"]["uid"] for pod in model.pods()}


def is_ready(pod: Object) -> bool:
    return any(one["type"] == "Ready" and one["status"] == "True" for one in pod["status"].get("conditions", []))


def faults_told(model: Model) -> Object:
    """All that says of a fault, of a repair or of what was spent on one."""
    status = model.status()
    groups = [(one.get("lastFaultID", 0), one.get("recovery")) for one in status["groups"]]
    known = {name: status.get(name) for name in ("lastFault", "lastRecovery", "nodeFaults", "recoveries", "savings")}
    events = [one["message"] for one in model.api.items("events", model.namespace) if "RankLost" in one["message"]]
    return {**known, "groups": groups, "events": events}


def whole_groups(model: Model) -> set[str]:
    """Those of which two pods are Ready and stay."""
    ready = [pod["metadata"]["labels"]["lockstep.dev/group"] for pod in model.pods() if is_ready(pod)]
    return {group for group in ready if ready.count(group) == 2}


def test_evictions_take_one_group_at_a_time_and_all_of_it(pair: Model) -> None:
    told_before = faults_told(pair)
    with Load(pair) as load:
        pair.until("an answer", lambda: load.answered > 0)
        before = {
            pod["metadata"]["uid"] for pod in pair.pods() if pod["metadata"]["labels"]["lockstep.dev/group"] == "0"
        }
        assert evict(pair, "chat-0-1") == ""
        refusal = evict(pair, "chat-1-1")
        assert "violate the pod's disruption budget" in refusal
        pair.until("the group's other pod to be unready", lambda: not is_ready(pair.pod(0, 0)), 30)
        assert evict(pair, "chat-0-0") == "", "it may go: none of its group serves"
        refusals, last = 0, pair.pod(1, 1)["metadata"]["uid"]
        while evict(pair, "chat-1-1"):
            refusals += 1
        assert "0" in whole_groups(pair), "the other may go when the first is whole"
        assert refusals > 0
        pair.until("a successor of the last", lambda: len(there := uids(pair)) == 4 and last not in there, 60)
        pair.until_serving(2)
    assert load.failures == [], "\n".join(load.failures)
    after = {pod["metadata"]["uid"] for pod in pair.pods() if pod["metadata"]["labels"]["lockstep.dev/group"] == "0"}
    assert not before & after
    assert faults_told(pair) == told_before, "a pod that was drained is no fault of anybody's"


def test_somebody_elses_budget_is_told_and_ours_gives_way(pair: Model) -> None:
    spec = {"maxUnavailable": 1, "selector": {"matchLabels": {"lockstep.dev/model": pair.name}}}
    metadata = {"name": "theirs", "namespace": pair.namespace}
    kubectl.apply({"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": metadata, "spec": spec})

    def ours() -> bool:
        return pair.api.find("poddisruptionbudgets", pair.namespace, pair.name) is not None

    pair.until("ours to be gone", lambda: not ours(), 30)
    pair.until("that to be told", lambda: pair.condition("DisruptionsBounded").get("reason") == "OtherBudget", 30)
    assert "PodDisruptionBudget theirs" in pair.condition("DisruptionsBounded")["message"]
    pair.kubectl("delete", "poddisruptionbudget", "theirs")
    pair.until("ours to be back", ours, 30)


def test_a_fenced_group_gets_no_requests_and_is_left_alone(pair: Model) -> None:
    address, pods = pair.pod(1, 0)["status"]["podIP"], uids(pair)
    pair.kubectl("annotate", "tpm", pair.name, "lockstep.dev/fenced-groups=1")
    with Load(pair, clients=2) as load:
        pair.until("it to leave the Service", lambda: address not in pair.endpoints(), 60)
        pair.until("it to be told", lambda: pair.is_true("Paused"), 60)
        assert pair.condition("Paused")["reason"] == "GroupsFenced"
    pair.kubectl("annotate", "tpm", pair.name, "lockstep.dev/fenced-groups-")
    pair.until_serving(2)
    assert load.failures == [], "\n".join(load.failures)
    assert uids(pair) == pods


def test_an_only_group_is_moved_when_another_is_ready(pair: Model) -> None:
    pair.kubectl("scale", "tpm", pair.name, "--replicas=1")
    pair.until_serving(1)
    pair.until("the other group to be gone", lambda: len(pair.children("pods")) == 2)
    leaving = pair.pod(0, 0)["metadata"]["uid"]
    assert "violate the pod's disruption budget" in evict(pair, "chat-0-0")
    with Load(pair) as load:
        pair.until("an answer", lambda: load.answered > 0)
        pair.kubectl("annotate", "pod", "chat-0-0", "lockstep.dev/evacuate=true")
        fewest, deadline = 1, time.monotonic() + MOVED_SECONDS
        while leaving in {pod["metadata"]["uid"] for pod in pair.children("pods")}:
            fewest = min(fewest, len(pair.endpoints()))
            assert time.monotonic() < deadline, pair.explain()
            time.sleep(SAMPLES_SECONDS)
        pair.until("the stand-in to be gone", lambda: len(pair.children("pods")) == 2, MOVED_SECONDS)
        pair.until_serving(1)
    assert fewest == 1, "there was a leader that took requests at every moment"
    assert load.failures == [], "\n".join(load.failures)


@pytest.fixture
def nodes(api: ClusterApi, tmp_path: Path) -> Iterator[FakeNodes]:
    with fake_nodes(api, tmp_path) as nodes:
        yield nodes


def test_a_group_leaves_a_cordoned_node_when_another_is_ready(
    api: ClusterApi, namespace: str, nodes: FakeNodes
) -> None:
    names = nodes.add(2)
    model = Model(api, namespace, "cordoned")
    model.apply(tiny_chat(template={"spec": nodes.placement}))
    model.until("both pods to be Ready", lambda: whole_groups(model) == {"0"}, 60)
    node = str(model.pod(0, 0)["spec"]["nodeName"])
    kubectl.kubectl("cordon", node)
    seen: list[set[str]] = []
    deadline = time.monotonic() + MOVED_SECONDS
    while any(pod["spec"].get("nodeName") == node for pod in model.children("pods")) or whole_groups(model) != {"0"}:
        seen.append(whole_groups(model))
        assert time.monotonic() < deadline, model.explain()
        time.sleep(SAMPLES_SECONDS)
    assert all(seen), "a whole group at every moment"
    assert {"0", "1"} in seen, "the other one was Ready before the pods went"
    assert {pod["spec"]["nodeName"] for pod in model.pods()} == set(names) - {node}
    model.delete()
