"""The record of faults, to the digit."""

from __future__ import annotations

import pytest

from lockstep_runtime.protocol.status import Fault
from lockstep_runtime.recovery.diagnosis import Evidence
from lockstep_runtime.recovery.fault_log import KEPT, FaultLog
from lockstep_runtime.recovery.policy import Rung

LOST = Evidence(Fault.RANK_LOST, 1, "rank 1 was killed by SIGKILL")
FAILED = Evidence(Fault.STEP_FAILED, 2, "rank 2: out of memory")
ODD = Evidence(Fault.DESYNC, None, "the ranks' hidden states differ")


def book_of(*causes: Evidence, detect: float = 0.0) -> FaultLog:
    book = FaultLog([], 0)
    for cause in causes:
        book.begin(cause, Rung.REBUILD, at=1.0, epoch=1, detect=detect)
    return book


def test_of_another_engine_s_history_the_newest_are_kept() -> None:
    long = [book_of(LOST).records[0] for _ in range(KEPT + 8)]
    assert FaultLog(long, 0).records == long[-KEPT:]


def test_seconds_are_rounded_to_a_tenth_of_a_millisecond() -> None:
    book = book_of(FAILED, LOST, detect=0.123456)
    book.repaired({}, at=2.0, resumed=1)
    assert book.token(5.123456)
    older, newest = book.records
    assert older.phases == {"detect": 0.1235}
    assert newest.phases == {"detect": 0.1235, "firstToken": 3.1235}


def test_phases_are_told_as_they_end_and_those_of_an_attempt_that_failed_are_forgotten() -> None:
    book = book_of(FAILED, LOST, detect=1.0)
    for name in ("abort", "respawn", "rebuild"):
        book.phase(name, 0.25)
    assert [one.phases for one in book.records] == [
        {"detect": 1.0, "abort": 0.25, "respawn": 0.25, "rebuild": 0.25}
    ] * 2
    book.phase("abort", 0.12345)
    assert book.records[-1].phases == {"detect": 1.0, "abort": 0.1235}
    book.repaired({"abort": 0.1235, "verify": 0.5}, at=2.0, resumed=0)
    book.phase("abort", 9.0)  # nothing is open any longer
    assert book.records[-1].phases == {"detect": 1.0, "abort": 0.1235, "verify": 0.5}


@pytest.mark.parametrize(("resumed", "awaited"), [(0, False), (1, True), (2, True)])
def test_a_first_token_is_awaited_only_where_a_request_went_on(resumed: int, awaited: bool) -> None:
    book = book_of(LOST)
    book.repaired({}, at=2.0, resumed=resumed)
    assert book.token(3.0) is awaited


def test_what_is_said_again_is_counted_each_time() -> None:
    book = book_of(LOST)
    for times in range(1, 6):
        book.set_cause(1, "it was killed", Rung.RESPAWN)
        counted = f" ({times} times)" if times > 1 else ""
        assert book.records[0].message == f"{LOST.message}; it was killed{counted}"


def test_what_is_counted_is_bounded_at_every_moment() -> None:
    book = book_of(LOST)
    for number in range(3 * KEPT):
        book.set_cause(1, f"it was killed in {number}", Rung.RESPAWN)
        assert len(book._added) <= KEPT


def test_the_fault_that_comes_again_is_the_newest() -> None:
    book = book_of(FAILED, LOST)
    assert book.begin(LOST, Rung.REBUILD, at=2.0, epoch=2, detect=0.0) == book.records[-1]


def test_an_open_fault_that_names_nobody_becomes_a_rank_s() -> None:
    book = book_of(ODD)
    book.repaired({}, at=2.0, resumed=0)
    book.attribute(Fault.DESYNC, 2, "its cache held NaN")
    assert book.records[0].rank is None  # that is closed
    book.begin(ODD, Rung.REBUILD, at=3.0, epoch=2, detect=0.0)
    book.begin(FAILED, Rung.REBUILD, at=3.0, epoch=2, detect=0.0)
    book.attribute(Fault.DESYNC, 2, "its cache held NaN")
    assert [one.rank for one in book.records] == [None, 2, 2]
    assert book.records[1].message == f"{ODD.message}; its cache held NaN"
    assert book.records[2].message == FAILED.message


def test_a_repair_brought_new_processes_unless_it_is_said_otherwise() -> None:
    book = book_of(LOST)
    book.repaired({}, at=2.0, resumed=0)
    assert book.records[0].rung == Rung.RESPAWN


def test_a_dropped_request_took_no_time_to_notice() -> None:
    assert book_of().drop(FAILED, at=2.0, epoch=1).phases == {"detect": 0.0}


def test_what_it_remembers_beside_the_records_is_counted() -> None:
    book = book_of(FAILED, LOST)
    assert book.footprint == 2  # open ones
    for words in ("it was killed", "it was killed", "it did not leave", "it stood still"):
        book.set_cause(1, words, Rung.RESPAWN)
    assert book.footprint == 2 + 3
    book.repaired({}, at=2.0, resumed=0)
    assert book.footprint == 0


def test_without_an_open_fault_there_is_nothing_whose_cause_could_be_set() -> None:
    log = FaultLog([], 0)
    log.set_cause(0, "rank 0 did not leave and was killed", Rung.RESPAWN)
    assert (log.records, log.open_id) == ([], 0)
