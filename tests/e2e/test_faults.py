"""A rank fails in a real pod, in every way there is: clients notice a pause, the status says who, and no pod ends."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Final

import pytest
from tests.support.chaos import Cell
from tests.support.cluster_api import ClusterApi
from tests.support.cluster_faults import (
    WORKER,
    begun,
    breakable,
    events,
    inject,
    read,
    restarts,
    until_told,
)
from tests.support.cluster_model import Model
from tests.support.cluster_processes import kill, one_process
from tests.support.stream import Answer, Stream, answers

from lockstep_runtime.protocol.chaos import CollectivePoint, FaultPhase, Injection

TOKENS: Final = 64
SKIPPED_STEPS: Final = 8  # so that a fault in a decode step meets streams that have begun
# Sent to the rank's process from its node; all other faults come from `lockstep inject`.
SIGNALS: Final = {
    Injection.SIGKILL: signal.SIGKILL,
    Injection.SIGSTOP: signal.SIGSTOP,
    Injection.SIGSEGV: signal.SIGSEGV,
}
# Fault, phase, rank and, for a hang, where seen from the collective. Cheap and dear faults alternate: budgets refill.
CELLS: Final = (
    (Injection.RAISE, FaultPhase.DECODE, 1),
    (Injection.SIGKILL, FaultPhase.DECODE, 0),
    (Injection.HANG, FaultPhase.DECODE, 0, CollectivePoint.BEFORE),
    (Injection.SIGSTOP, FaultPhase.DECODE, 1),
    (Injection.NAN, FaultPhase.PREFILL, 1),
    (Injection.EXIT, FaultPhase.DECODE, 0),
    (Injection.HANG, FaultPhase.PREFILL, 1, CollectivePoint.INSIDE),
    (Injection.INPUT, FaultPhase.DECODE, 1),
    (Injection.SIGSEGV, FaultPhase.DECODE, 1),
    (Injection.MEMORY, FaultPhase.DECODE, 1),
    (Injection.HANG, FaultPhase.DECODE, 1, CollectivePoint.AFTER),
    (Injection.ACTIVATION, FaultPhase.PREFILL, 0),
    (Injection.CLOSE_BUS, FaultPhase.DECODE, 1),
    (Injection.SIGKILL, FaultPhase.IDLE, 1),
)


def cells() -> list[Cell]:
    return [Cell(kind, at[0] if at else CollectivePoint.BEFORE, phase, rank, 2) for kind, phase, rank, *at in CELLS]


@pytest.fixture(scope="module")
def faulty(api: ClusterApi, new_namespace: Callable[[str], str]) -> Iterator[Model]:
    """One model for all cases: each must leave it as it was."""
    model = Model(api, new_namespace("faults"), "faulty")
    model.apply(breakable())
    model.until_ready()
    yield model
    model.delete()


@pytest.fixture(scope="module")
def undisturbed(faulty: Model) -> list[Answer]:
    found = answers(read(faulty, TOKENS))
    assert all(answer.text and answer.finish == "length" and answer.done and not answer.error for answer in found)
    return found


@pytest.mark.parametrize("cell", cells(), ids=lambda cell: cell.name)
def test_clients_notice_a_pause_and_nothing_else(cell: Cell, faulty: Model, undisturbed: list[Answer]) -> None:
    known, pods, epoch = set(events(faulty)), restarts(faulty), faulty.status()["groups"][0]["epoch"]

    readers = provoke(faulty, cell)

    assert answers(readers) == undisturbed, faulty.explain()
    assert_told(faulty, cell, known)
    assert faulty.status()["groups"][0]["epoch"] > epoch
    assert restarts(faulty) == pods
    assert set(pods.values()) == {0}
    for after, whole in zip(answers(read(faulty, TOKENS // 8)), undisturbed, strict=True):
        assert after.finish
        assert whole.text.startswith(after.text), "the next request"
    print(f"{cell.name}: pause {max(reader.pause for reader in readers):.2f} s, {faulty.status()['lastRecovery']}")


def provoke(model: Model, cell: Cell) -> list[Stream]:
    """Let the fault happen while clients read; an idle group gets them right afterwards."""
    if cell.kind in SIGNALS and cell.phase is not FaultPhase.PREFILL:
        process = one_process(model.pod(0, cell.rank), WORKER)
        readers = [] if cell.phase is FaultPhase.IDLE else read(model, TOKENS)
        begun(readers, SKIPPED_STEPS)
        kill(process, SIGNALS[cell.kind])
        return readers or read(model, TOKENS)
    skip = SKIPPED_STEPS if cell.phase is FaultPhase.DECODE else 0
    inject(model, cell.kind, cell.rank, f"--phase={cell.phase}", f"--at={cell.at}", f"--skip={skip}")
    return read(model, TOKENS)


def assert_told(model: Model, cell: Cell, known: set[str]) -> None:
    """An Event and `status.lastFault` name the fault and the rank, and tell of the repair."""
    faults, ranks = cell.expected
    who = ["group 0" if rank is None else f"group 0 rank {rank}" for rank in ranks]
    until_told(model, known, faults, [f"{one}: " for one in who])
    model.until("the repair in the status", lambda: "recoveredTime" in model.status()["lastFault"], 20)
    model.until_ready(30)
    until_told(model, known, ["Recovered"], [f"{one} recovered from {fault} " for one in who for fault in faults])
    fault = model.status()["lastFault"]
    assert fault["fault"] in faults
    assert fault.get("rank") in ranks
