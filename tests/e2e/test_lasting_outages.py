"""Outages that nobody ends: the group's own deadline and the operator's rungs end the wait of its clients."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final

import pytest
from tests.support.cluster_api import ClusterApi
from tests.support.cluster_faults import WORKER, address, begun, breakable, cut_between, cut_off, read
from tests.support.cluster_model import Model, Object
from tests.support.cluster_processes import container_processes, kill, one_process
from tests.support.stream import Answer, answers

pytestmark = pytest.mark.lasting

RECYCLED_SECONDS: Final = 180.0  # from the cut to another pod in the place of the one that was cut off
SERVING_SECONDS: Final = 120.0
TOKENS: Final = 1900
LOOK_SECONDS: Final = 0.05
Cut = Callable[[Object, Object], AbstractContextManager[None]]


def from_its_leader(leader: Object, member: Object) -> AbstractContextManager[None]:
    """Its kubelet still finds the pod in order."""
    return cut_between(leader, member)


def from_everybody(leader: Object, member: Object) -> AbstractContextManager[None]:
    """Its kubelet's probes fail, too."""
    return cut_off(member)


@pytest.fixture(scope="module")
def lasting(api: ClusterApi, new_namespace: Callable[[str], str]) -> Iterator[Model]:
    """Two groups in four pods for all tests of this file: each leaves them Ready."""
    model = Model(api, new_namespace("lasting"), "lasting")
    model.apply(breakable(replicas=2))
    model.until_serving(2)
    yield model
    model.delete()


@pytest.fixture(scope="module")
def undisturbed(lasting: Model) -> list[Answer]:
    found = answers(read(lasting, TOKENS, address(lasting.pod(0, 0))))
    assert all(answer.text and answer.finish == "length" and answer.done and not answer.error for answer in found)
    return found


def uid_of(model: Model, group: int, index: int) -> str:
    """Empty while there is no such pod."""
    found = model.api.find("pods", model.namespace, f"{model.name}-{group}-{index}")
    return str(found["metadata"]["uid"]) if found is not None else ""


@pytest.mark.parametrize("cut", [from_its_leader, from_everybody])
def test_a_member_that_stays_cut_off_is_recycled(lasting: Model, undisturbed: list[Answer], cut: Cut) -> None:
    """The other group is healed meanwhile, and every client gets the whole of its answer, or is told that it won't."""
    leader, member = lasting.pod(0, 0), lasting.pod(0, 1)
    old = {uid_of(lasting, 0, 0), uid_of(lasting, 0, 1)}
    readers = read(lasting, TOKENS, address(leader))
    begun(readers)

    with cut(leader, member):
        began = time.monotonic()
        others = read(lasting, TOKENS, address(lasting.pod(1, 0)))
        begun(others)
        kill(one_process(lasting.pod(1, 1), WORKER))
        assert answers(others) == undisturbed, lasting.explain()
        lasting.until("another pod", lambda: uid_of(lasting, 0, 1) not in {"", *old}, RECYCLED_SECONDS)
        print(f"recycled {time.monotonic() - began:.1f} s after the cut")
        lasting.until_serving(2, SERVING_SECONDS)
        print(f"serves {time.monotonic() - began:.1f} s after the cut")

    found = answers(readers)
    told = [answer.error or answer == whole for answer, whole in zip(found, undisturbed, strict=True)]
    assert all(told), found
    assert answers(read(lasting, TOKENS, address(lasting.pod(0, 0)))) == undisturbed


class Stopper:
    """A thread that stops (SIGSTOP) every worker process of a pod as soon as it is there, until it is told to end."""

    def __init__(self, pod: Object) -> None:
        self._pod = pod
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.stopped: set[int] = set()

    def _run(self) -> None:
        while not self._end.wait(LOOK_SECONDS):
            for pid, command in container_processes(self._pod).items():
                if command.startswith(WORKER) and pid not in self.stopped:
                    self.stopped.add(pid)
                    kill(pid, 19)

    @contextmanager
    def running(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._end.set()
            self._thread.join()


def test_a_rank_whose_every_process_stands_still_poisons_its_group(lasting: Model, undisturbed: list[Answer]) -> None:
    """Each process that takes the rank's place is stopped while it loads: respawns end, and the pod is recycled."""
    pod, old = lasting.pod(0, 1), uid_of(lasting, 0, 1)
    stopper = Stopper(pod)

    with stopper.running():
        began = time.monotonic()
        lasting.until("another pod", lambda: uid_of(lasting, 0, 1) not in {"", old}, RECYCLED_SECONDS)
        print(f"{len(stopper.stopped)} processes stopped; recycled after {time.monotonic() - began:.1f} s")
        lasting.until_serving(2, SERVING_SECONDS)

    assert answers(read(lasting, TOKENS, address(lasting.pod(0, 0)))) == undisturbed
