"""A rank that must read its weights again from a volume that hangs: its group gives up, and gets another pod."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import pytest
from tests.support.cluster_api import ClusterApi
from tests.support.cluster_faults import WORKER, address, begun, breakable, read
from tests.support.cluster_model import Model
from tests.support.cluster_processes import container_processes, kill, one_process
from tests.support.hanging_file import hanging, waits_for_a_writer
from tests.support.status_watch import StatusWatch, watched
from tests.support.stream import answers
from tests.support.wait import until

pytestmark = pytest.mark.lasting

POISONED_SECONDS: Final = 180.0  # from the fault on
RECYCLED_SECONDS: Final = 60.0  # and from then on
HUNG_SECONDS: Final = 30.0
TOKENS: Final = 1900
WEIGHTS: Final = "/model/model.safetensors"
GAVE_UP: Final = "could not get its weights, and got no further for"


def poisoned(seen: StatusWatch) -> list[str]:
    """What the condition has said."""
    return [condition["message"] for condition in seen.conditions("Poisoned") if condition["status"] == "True"]


@contextmanager
def timed(what: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    print(f"{what} after {time.monotonic() - began:.1f} s")


def test_a_reload_that_hangs_for_good_poisons_the_group_which_is_recycled(api: ClusterApi, namespace: str) -> None:
    """No process is stopped: each that takes the rank's place is in open(2). The other group is healed meanwhile."""
    model = Model(api, namespace, "hung")
    model.apply(breakable(replicas=2, recovery={"weightCache": "Off"}))
    model.until_serving(2)
    whole = answers(read(model, TOKENS, address(model.pod(1, 0))))
    leader, member = model.pod(0, 0), model.pod(0, 1)
    readers = read(model, TOKENS, address(leader))
    begun(readers)

    with watched(model) as seen, hanging(member, WEIGHTS), timed("recycled"):
        fault = time.monotonic()
        kill(one_process(member, WORKER), signal.SIGSEGV)  # what it was forked from is not trusted then: it loads anew
        until("the reload to hang", lambda: _is_hung(model), HUNG_SECONDS, model.explain)

        others = read(model, TOKENS, address(model.pod(1, 0)))
        begun(others)
        kill(one_process(model.pod(1, 1), WORKER))
        assert answers(others) == whole, model.explain()

        left = POISONED_SECONDS - (time.monotonic() - fault)
        with timed("Poisoned, from the other group's repair,"):
            model.until("Poisoned", lambda: any(GAVE_UP in words for words in poisoned(seen)), left)
        model.until("another pod", lambda: _uid(model) not in ("", member["metadata"]["uid"]), RECYCLED_SECONDS)
        model.until_serving(2)

    assert model.pod(0, 0)["metadata"]["uid"] == leader["metadata"]["uid"], "the suspect's pod was enough"
    found = answers(readers)
    assert all(answer.error or answer == all_of_it for answer, all_of_it in zip(found, whole, strict=True)), found
    assert answers(read(model, TOKENS, address(model.pod(0, 0)))) == whole


def _is_hung(model: Model) -> bool:
    processes = container_processes(model.pod(0, 1))
    return any(waits_for_a_writer(pid) for pid, command in processes.items() if command.startswith(WORKER))


def _uid(model: Model) -> str:
    """Empty while there is no such pod."""
    found = model.api.find("pods", model.namespace, f"{model.name}-0-1")
    return str(found["metadata"]["uid"]) if found is not None else ""
