"""What a leader's supervisor says while there is no engine."""

from __future__ import annotations

import msgspec
import pytest

from lockstep_runtime.config import ServeConfig
from lockstep_runtime.protocol.status import Fault, FaultRecord, GroupState
from lockstep_runtime.recovery.fault_log import FaultLog
from lockstep_runtime.supervisor.status_store import FAULTS_KEPT, GIVE_UP_AFTER, StatusStore


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> StatusStore:
    clock = iter(range(1_000, 100_000))
    monkeypatch.setattr("lockstep_runtime.supervisor.status_store.time.time", lambda: float(next(clock)))
    return StatusStore(ServeConfig(model="m", served_name="m", tensor_parallel_size=2))


def serving(board: StatusStore) -> None:
    board.take(msgspec.structs.replace(board.status, state=GroupState.READY, accepting=True, since=1.0, epoch=7))


def test_an_engine_that_served_is_missed_and_one_that_never_did_is_awaited(board: StatusStore) -> None:
    board.engine_lost("was killed by SIGKILL", 1)
    assert (board.status.state, board.status.accepting) == (GroupState.STARTING, False)
    serving(board)
    board.engine_lost("was killed by SIGKILL", 0)
    assert (board.status.state, board.status.accepting) == (GroupState.RECOVERING, False)
    assert board.status.message == "the engine was killed by SIGKILL and is started again"


def test_how_long_it_has_been_gone_is_counted_from_the_first_loss(board: StatusStore) -> None:
    serving(board)
    board.engine_lost("ended", 0)
    since = board.status.since
    board.engine_lost("ended", 1)
    assert board.status.since == since


def test_one_that_ends_again_and_again_poisons_the_group_with_one_fault(board: StatusStore) -> None:
    serving(board)
    for failures in range(GIVE_UP_AFTER):
        board.engine_lost("ended with exit code 1", failures)
        assert board.status.state is GroupState.RECOVERING
    board.engine_lost("ended with exit code 1", GIVE_UP_AFTER)
    assert board.status.state is GroupState.POISONED
    since, [fault] = board.status.since, board.status.faults
    assert (fault.id, fault.rank, fault.epoch, fault.recovered_at) == (1, None, 7, None)
    assert fault.message == f"the engine ended with exit code 1, for the {GIVE_UP_AFTER}th time in a row"
    for failures in range(GIVE_UP_AFTER + 1, 10_000):
        board.engine_lost("ended with exit code 1", failures)
    assert (board.status.faults, board.status.since) == ([fault], since)


def test_the_next_engine_goes_on_from_that_fault_and_repairs_it(board: StatusStore) -> None:
    serving(board)
    board.engine_lost("ended", GIVE_UP_AFTER)
    history = board.from_engine
    assert history is not None
    log = FaultLog(history.faults, history.recoveries)
    assert log.open_id == 1
    log.repaired({"rebuild": 1.0}, at=5.0, resumed=0)
    assert [one.recovered_at for one in log.records] == [5.0]


def test_faults_that_are_kept_are_bounded(board: StatusStore) -> None:
    old = [
        FaultRecord(id=n, fault=Fault.HANG, rank=0, message="m", at=1.0, epoch=n, recovered_at=2.0)
        for n in range(1, FAULTS_KEPT + 1)
    ]
    board.take(msgspec.structs.replace(board.status, state=GroupState.READY, faults=old))
    board.engine_lost("ended", GIVE_UP_AFTER)
    assert [one.id for one in board.status.faults] == list(range(2, FAULTS_KEPT + 2))
