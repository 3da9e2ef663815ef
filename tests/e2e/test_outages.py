"""What befalls whole pods, their network, their node and the operator, and what clients notice of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Final

import httpx
import pytest
from tests.support import kubectl
from tests.support.cluster_api import ClusterApi
from tests.support.cluster_chaos import operator_away
from tests.support.cluster_faults import (
    TOLD_SECONDS,
    WORKER,
    address,
    begun,
    breakable,
    cut_off,
    events,
    kubelet,
    read,
    restarts,
    until_told,
)
from tests.support.cluster_model import Model, Object
from tests.support.cluster_processes import container_processes, kill, one_process, stopped
from tests.support.http import HTTP
from tests.support.stream import Answer, answers
from tests.support.wait import until

pytestmark = pytest.mark.outage

TOKENS: Final = 1900  # of a stream, nearly the model's context: what is computed again must show, on any machine
FEW_TOKENS: Final = 100  # while the node counts as lost, for its pods are evicted after 30 s
NODE_LOST_SECONDS: Final = 120.0  # the node controller waits 50 s by itself
DRAIN_SECONDS: Final = 300
HEALED_SECONDS: Final = 120.0


@pytest.fixture(scope="module")
def outlasting(api: ClusterApi, new_namespace: Callable[[str], str]) -> Iterator[Model]:
    """Two groups in four pods for all tests of this file: each leaves them Ready."""
    model = Model(api, new_namespace("outages"), "outlasting")
    spec = breakable(replicas=2)
    # A leader's drain ends after whole streams of this length, however busy the machine is.
    spec["template"]["spec"]["terminationGracePeriodSeconds"] = DRAIN_SECONDS
    model.apply(spec)
    model.until_serving(2)
    yield model
    model.delete()


@pytest.fixture(scope="module")
def whole(outlasting: Model) -> list[Answer]:
    """Of streams that nothing disturbs."""
    found = answers(read(outlasting, TOKENS, address(outlasting.pod(0, 0))))
    assert all(answer.text and answer.finish == "length" and answer.done and not answer.error for answer in found)
    return found


def delete(model: Model, pod: Object) -> None:
    model.kubectl("delete", "pod", pod["metadata"]["name"], "--wait=false")


def until_replaced(model: Model, pod: Object) -> None:
    """Until another pod has its name, and all groups serve."""
    name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]

    def new() -> bool:
        found = model.api.find("pods", model.namespace, name)
        return found is not None and found["metadata"]["uid"] != uid

    model.until(f"a new pod {name}", new)
    model.until_serving(2)


def ask(url: str, name: str) -> str:
    """A short answer, or none."""
    body = {"model": name, "prompt": "A class", "max_tokens": 4, "temperature": 0}
    try:
        answer = HTTP.post(f"{url}/v1/completions", json=body, timeout=30)
    except httpx.HTTPError:
        return ""
    return str(answer.json()["choices"][0]["text"]) if answer.status_code == httpx.codes.OK else ""


def test_a_member_pod_is_deleted(outlasting: Model, whole: list[Answer]) -> None:
    pod = outlasting.pod(0, 1)
    readers = read(outlasting, TOKENS, address(outlasting.pod(0, 0)))
    begun(readers)

    delete(outlasting, pod)

    assert answers(readers) == whole, outlasting.explain()
    print(f"the pause was {max(reader.pause for reader in readers):.2f} s")
    until_replaced(outlasting, pod)


def test_a_leader_pod_is_deleted_and_drains(outlasting: Model, whole: list[Answer]) -> None:
    pod = outlasting.pod(0, 0)
    readers = read(outlasting, TOKENS, address(pod))
    begun(readers)

    delete(outlasting, pod)

    assert answers(readers) == whole, outlasting.explain()
    assert ask(outlasting.url(), outlasting.served())
    until_replaced(outlasting, pod)
    assert answers(read(outlasting, TOKENS, address(outlasting.pod(0, 0)))) == whole


def test_a_leader_pod_dies_with_all_its_processes(outlasting: Model, whole: list[Answer]) -> None:
    """Its clients' connections die, too: none may take its part of an answer for the whole."""
    pod, url, name = outlasting.pod(0, 0), outlasting.url(), outlasting.served()
    readers = read(outlasting, TOKENS, address(pod))
    begun(readers)

    for process in container_processes(pod):
        with suppress(ProcessLookupError):  # the first one's end is the end of all
            kill(process)
    died = time.monotonic()

    for answer, undisturbed in zip(answers(readers), whole, strict=True):
        assert answer.text != undisturbed.text
        assert not answer.looks_whole, answer
    until("an answer to a client that tries again", lambda: ask(url, name), 10)
    print(f"a client that tries again was answered after {time.monotonic() - died:.2f} s")
    outlasting.until("the container to be started again", lambda: restarts(outlasting)[pod["metadata"]["uid"]] == 1)
    outlasting.until_serving(2)
    assert answers(read(outlasting, TOKENS, address(outlasting.pod(0, 0)))) == whole


def test_a_member_pod_is_cut_off_from_the_network(outlasting: Model, whole: list[Answer]) -> None:
    pod, pods, known = outlasting.pod(0, 1), restarts(outlasting), set(events(outlasting))
    readers = read(outlasting, TOKENS, address(outlasting.pod(0, 0)))
    begun(readers)

    with cut_off(pod):
        cut = time.monotonic()
        until_told(outlasting, known, ["Hang", "RankLost"], ["group 0: ", "group 0 rank 1: "])
        assert outlasting.status()["groups"][0]["state"] == "Recovering"
        outlasting.until("the suspect", lambda: outlasting.status()["lastFault"].get("rank") == 1, TOLD_SECONDS)
        print(f"told after {time.monotonic() - cut:.1f} s: {outlasting.status()['lastFault']['message']}")

    assert answers(readers) == whole, outlasting.explain()
    print(f"the pause was {max(reader.pause for reader in readers):.2f} s")
    outlasting.until_serving(2)
    assert restarts(outlasting) == pods, "the pods are those that were there before"


def test_the_nodes_kubelet_stops(outlasting: Model, whole: list[Answer]) -> None:
    """Groups heal themselves and serve meanwhile, by their own addresses even where the node counts as lost."""
    leader, member, pods = outlasting.pod(0, 0), outlasting.pod(0, 1), restarts(outlasting)

    with stopped(kubelet()):
        readers = read(outlasting, TOKENS, address(leader))
        begun(readers)
        kill(one_process(member, WORKER))
        assert answers(readers) == whole, outlasting.explain()
        outlasting.until("the lost node in the status", lambda: node_is_lost(outlasting), NODE_LOST_SECONDS)
        assert outlasting.condition("Ready")["status"] == "False"
        again = answers(read(outlasting, FEW_TOKENS, address(leader)))
        assert all(one.text.startswith(few.text) for one, few in zip(whole, again, strict=True))
        assert all(few.text and few.done for few in again)

    outlasting.until_serving(2, HEALED_SECONDS)
    until("the node to be one again", lambda: not evicting(), HEALED_SECONDS)
    assert restarts(outlasting) == pods, "the pods are those that were there before"
    assert ask(outlasting.url(), outlasting.served())


def evicting() -> list[Object]:
    """Taints by which Kubernetes is about to evict pods: they outlast the kubelet's absence by some seconds."""
    taints = [taint for node in kubectl.get("nodes")["items"] for taint in node["spec"].get("taints", [])]
    return [taint for taint in taints if taint["effect"] == "NoExecute"]


def node_is_lost(model: Model) -> bool:
    return any("doesn't respond" in group.get("message", "") for group in model.status()["groups"])


def test_the_operator_is_absent(api: ClusterApi, outlasting: Model, whole: list[Answer]) -> None:
    """Groups heal themselves, and what happened is told when it is back."""
    pod = outlasting.pod(1, 1)

    with operator_away(api):
        known, recoveries = set(events(outlasting)), outlasting.status()["recoveries"]
        readers = [
            *read(outlasting, TOKENS, address(outlasting.pod(0, 0))),
            *read(outlasting, TOKENS, address(outlasting.pod(1, 0))),
        ]
        begun(readers)
        kill(one_process(outlasting.pod(0, 0), WORKER))
        delete(outlasting, pod)
        assert answers(readers) == [*whole, *whole], outlasting.explain()
        assert set(events(outlasting)) == known
        assert outlasting.status()["recoveries"] == recoveries

    until_replaced(outlasting, pod)
    until_told(outlasting, known, ["RankLost"], ["group 0 rank 0: "])
    until_told(outlasting, known, ["Recovered"], ["group 0 rank 0 recovered from RankLost by Respawn"])
    faults = [event["message"] for event in events(outlasting).values() if event["reason"] == "RankLost"]
    assert not [text for text in faults if text.startswith("group 1 ")], "a pod that drained is no fault"
    assert outlasting.status()["recoveries"] == recoveries + 1
    assert outlasting.status()["lastFault"]["fault"] == "RankLost"
