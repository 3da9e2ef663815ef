"""Two operators, of which one works: when it is lost, or pauses, the other goes on, and no step is taken twice."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from typing import Final

import pytest
from tests.support import kubectl
from tests.support.cluster_api import ClusterApi
from tests.support.cluster_chaos import kill_operator, leading_operator, until_operator_ready
from tests.support.cluster_lifecycle import uids
from tests.support.cluster_model import OPERATOR_NAMESPACE, Model, Object, operator_pods, tiny_chat
from tests.support.cluster_processes import container_processes, kill, one_process, stopped
from tests.support.wait import until

TAKEN_OVER_SECONDS: Final = 20.0
ORDERLY_SECONDS: Final = 8.0  # less than a Lease lasts
LOST_LEASE: Final = 3  # exit status of an operator that ends because it can't lead any more
STEPS: Final = ("RankLost", "RecycleGroup", "Recovered")


@pytest.fixture
def model(api: ClusterApi, namespace: str) -> Iterator[Model]:
    """A group that can't heal itself: a rank that is lost is the operator's business. Its first fault: a second one
    would count against its node."""
    made = Model(api, namespace, "led")
    made.apply(tiny_chat(recovery={"strategy": "RecyclePods"}))
    made.until_ready()
    yield made
    made.delete()


@pytest.fixture
def leader(api: ClusterApi) -> Iterator[Object]:
    """Of two."""
    until_operator_ready(api)
    assert len(operator_pods(api)) == 2
    found = leading_operator(api)
    assert found is not None
    yield found
    until_operator_ready(api)


def told(model: Model) -> Counter[str]:
    """Steps that Events tell of: each try of a step has one of its own, with how often it was told."""
    events = model.api.items("events", model.namespace)
    of_model = [event for event in events if event["involvedObject"]["kind"] == "TensorParallelModel"]
    return Counter(event["reason"] for event in of_model if event["reason"] in STEPS)


def recycled(model: Model, before: set[str]) -> bool:
    return not before & uids(model)


def is_another(api: ClusterApi, pod: Object) -> bool:
    leader = leading_operator(api)
    return leader is not None and leader["metadata"]["name"] != pod["metadata"]["name"]


def since(began: float) -> str:
    """With how busy the machine is: the times of docs/install.md are of here."""
    return f"{time.monotonic() - began:.1f} s (load {os.getloadavg()[0]:.0f})"


def recovered_once(model: Model, known: Counter[str], recoveries: int) -> None:
    model.until_ready()
    model.until("the recovery in the status", lambda: model.status().get("recoveries", 0) == recoveries + 1, 30)
    model.until("the Events", lambda: told(model) - known >= Counter(STEPS), 20)
    assert told(model) - known == Counter(STEPS), "each step once"


def test_the_other_recycles_a_poisoned_group_when_the_leader_is_killed(
    api: ClusterApi, model: Model, leader: Object
) -> None:
    before, known, recoveries = uids(model), told(model), model.status().get("recoveries", 0)
    kill_operator(leader)
    killed = time.monotonic()
    kill(one_process(model.pod(0, 1), "lockstep: worker"))

    until("another to lead", lambda: is_another(api, leader), TAKEN_OVER_SECONDS)
    print(f"another led {since(killed)} after the leader was killed")
    model.until("the group to be replaced", lambda: recycled(model, before), TAKEN_OVER_SECONDS)
    print(f"replaced {since(killed)} after it")
    assert is_another(api, leader)
    recovered_once(model, known, recoveries)


def test_a_leader_that_was_paused_finds_another_in_its_place_and_ends(
    api: ClusterApi, model: Model, leader: Object
) -> None:
    before, known, recoveries = uids(model), told(model), model.status().get("recoveries", 0)
    (process,) = container_processes(leader)
    with stopped(process):
        paused = time.monotonic()
        kill(one_process(model.pod(0, 1), "lockstep: worker"))
        until("another to lead", lambda: is_another(api, leader), TAKEN_OVER_SECONDS)
        print(f"another led {since(paused)} after the leader was paused")
        model.until("the group to be replaced", lambda: recycled(model, before), TAKEN_OVER_SECONDS)
        print(f"replaced {since(paused)} after it")
        assert is_another(api, leader)
        model.until_ready()
    after = uids(model)

    def ended() -> bool:
        pod = api.find("pods", OPERATOR_NAMESPACE, leader["metadata"]["name"])
        assert pod is not None
        last = pod["status"]["containerStatuses"][0].get("lastState", {}).get("terminated", {})
        return bool(last.get("exitCode") == LOST_LEASE)

    until("the one that was paused to end", ended, 20)
    until_operator_ready(api)
    assert is_another(api, leader), "it stands by now"
    recovered_once(model, known, recoveries)
    assert uids(model) == after, "nothing was replaced a second time"


def test_one_that_ends_in_order_is_followed_at_once(api: ClusterApi, leader: Object) -> None:
    began = time.monotonic()
    kubectl.kubectl("-n", OPERATOR_NAMESPACE, "delete", "pod", leader["metadata"]["name"], "--wait=false")
    until("the other to lead", lambda: is_another(api, leader), ORDERLY_SECONDS)
    print(f"another led {since(began)} after the leader was deleted")
