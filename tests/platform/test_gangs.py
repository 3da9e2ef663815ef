"""Groups that a queue admits as a whole, beside groups whose pods are placed one by one: four nodes of eight GPUs, and
groups of two pods that want eight each."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

import pytest
from tests.platform.conftest import GPU, PLACED_SECONDS, Place
from tests.support.kueue import queue
from tests.support.kwok import FakeNodes
from tests.support.wait import until

pytestmark = pytest.mark.platform

RUNS: Final = 20
QUEUE: Final = {"kueue.x-k8s.io/queue-name": "gpus"}
QUOTAS: Final = {"cpu": "1k", "memory": "10Ti", GPU: "32"}


@pytest.fixture
def four_nodes(place: Place, nodes: FakeNodes) -> FakeNodes:
    nodes.add(4, {GPU: "8"})
    place.plane.apply(*queue(place.namespace, QUOTAS))
    return nodes


def groups_of_two_nodes(nodes: FakeNodes, replicas: int, **placement: Any) -> dict[str, Any]:
    return {
        "tensorParallelSize": 16,
        "ranksPerPod": 8,
        "replicas": replicas,
        "accelerator": {"resourceName": GPU},
        "template": {"spec": nodes.placement | placement},
    }


def placed(place: Place, name: str) -> Counter[int]:
    """Pods with a node, by group."""
    pods = place.pods(name)
    return Counter(int(pod["metadata"]["labels"]["lockstep.dev/group"]) for pod in pods if pod["spec"].get("nodeName"))


def pods_by_group(place: Place, nodes: FakeNodes, name: str, reason: str, **metadata: Any) -> list[int]:
    """Of three groups that are there before the four nodes come, as an autoscaler brings them: how many pods of each
    have a node, once the two pods that are left over wait for this reason."""
    place.model(name, **metadata, **groups_of_two_nodes(nodes, 3))
    until("six pods that wait", lambda: len(place.why_waiting(name)) == 6, PLACED_SECONDS, place.explain)
    nodes.add(4, {GPU: "8"})

    def settled() -> bool:
        return placed(place, name).total() == 4 and place.why_waiting(name) == [reason] * 2

    until(f"four pods to be placed, and two to wait: {reason}", settled, PLACED_SECONDS, place.explain)
    found = sorted(placed(place, name)[group] for group in range(3))
    place.delete(name)
    nodes.remove_all()
    return found


def test_a_queue_takes_whole_groups_only(place: Place, nodes: FakeNodes) -> None:
    place.plane.apply(*queue(place.namespace, QUOTAS))
    found = [pods_by_group(place, nodes, f"queued-{run}", "SchedulingGated", labels=QUEUE) for run in range(RUNS)]
    assert found == [[0, 2, 2]] * RUNS


def test_without_one_groups_are_left_with_half_of_their_pods(place: Place, nodes: FakeNodes) -> None:
    """At least once in so many runs: whose turn comes first is chance."""
    found = (pods_by_group(place, nodes, f"each-{run}", "Unschedulable") for run in range(RUNS))
    assert [1, 1, 2] in found


def test_who_waits_in_a_queue_is_told_left_alone_and_admitted_when_there_is_room(
    place: Place, four_nodes: FakeNodes
) -> None:
    place.plane.apply(*queue(place.namespace, QUOTAS | {GPU: "16"}))
    place.model("chat", labels=QUEUE, **groups_of_two_nodes(four_nodes, 2))
    until("one group's pods", lambda: [*placed(place, "chat").values()] == [2], PLACED_SECONDS, place.explain)

    def told() -> bool:
        return bool(place.condition("chat").get("reason") == "SchedulingGated")

    until("the model to tell", told, PLACED_SECONDS, place.explain)
    assert "kueue.x-k8s.io/admission" in place.condition("chat")["message"]
    assert place.condition("chat", "Stalled")["status"] == "False"
    place.until_at_rest()

    place.plane.apply(*queue(place.namespace, QUOTAS))
    until("all pods", lambda: placed(place, "chat") == {0: 2, 1: 2}, PLACED_SECONDS, place.explain)


def test_an_admitted_pod_that_is_replaced_needs_no_new_admission(place: Place, four_nodes: FakeNodes) -> None:
    place.model("chat", labels=QUEUE, **groups_of_two_nodes(four_nodes, 2))
    until("all pods", lambda: placed(place, "chat") == {0: 2, 1: 2}, PLACED_SECONDS, place.explain)
    before, groups = place.uids("pods", "chat"), place.uids("statefulsets", "chat")
    place.plane.kubectl(f"--namespace={place.namespace}", "delete", "pod", "chat-1-0", "--grace-period=0", "--force")

    def replaced() -> bool:
        return place.uids("pods", "chat").get("chat-1-0") != before["chat-1-0"] and placed(place, "chat") == {
            0: 2,
            1: 2,
        }

    until("the pod's successor", replaced, PLACED_SECONDS, place.explain)
    now = place.uids("pods", "chat")
    assert {name for name, uid in now.items() if uid != before[name]} == {"chat-1-0"}
    assert place.uids("statefulsets", "chat") == groups


def test_another_place_for_admitted_groups_is_reached_one_after_the_other(place: Place, four_nodes: FakeNodes) -> None:
    """The queue's webhook refuses it to a StatefulSet that it has admitted."""
    place.model("chat", labels=QUEUE, **groups_of_two_nodes(four_nodes, 2))
    until("all pods", lambda: placed(place, "chat") == {0: 2, 1: 2}, PLACED_SECONDS, place.explain)
    groups = place.uids("statefulsets", "chat")
    others = four_nodes.add(4, {GPU: "8"}, {"rack": "b"})
    selector = four_nodes.placement["nodeSelector"] | {"rack": "b"}
    place.model("chat", labels=QUEUE, **groups_of_two_nodes(four_nodes, 2, nodeSelector=selector))

    def moved() -> bool:
        found = place.nodes("chat")
        return len(found) == 2 and set().union(*found.values()) == set(others)

    until("the groups to have moved", moved, PLACED_SECONDS, place.explain)
    assert place.uids("statefulsets", "chat").keys() == groups.keys()
    assert not set(place.uids("statefulsets", "chat").values()) & set(groups.values())
    until("Ready", lambda: place.condition("chat").get("status") == "True", PLACED_SECONDS, place.explain)
