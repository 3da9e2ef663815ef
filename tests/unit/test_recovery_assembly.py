"""One attempt after the other to assemble a group: whom it asks what, how long that took, and what comes of it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from lockstep_runtime.protocol import bus
from lockstep_runtime.recovery import actions
from lockstep_runtime.recovery.actions import Action
from lockstep_runtime.recovery.assembly import Assembly, Step
from lockstep_runtime.recovery.log_trail import TrailPhase
from lockstep_runtime.recovery.rank_handle import RankHandle
from lockstep_runtime.recovery.self_test import PROBE_BLOCKS
from lockstep_runtime.recovery.timing import HOST, ROOM_SECONDS, Timing
from lockstep_runtime.recovery.verification import RETESTS

EPOCH = 3


def rank(number: int, process: int = 1, blocks: int = 40) -> RankHandle:
    handle = RankHandle(rank=number, pod_index=number)
    name = f"{number}.{process}"
    hello = bus.Hello(
        protocol=1, token="", role=bus.Role.WORKER, group=0, pod_index=number, pod="p", node="n", pid=1,
        incarnation=name, rank=number,
    )  # fmt: skip
    handle.arrive(hello, EPOCH, 0.0)
    handle.set_loaded(
        bus.Loaded(seconds=1, weight_bytes=1, read_bytes=1, cache_blocks=blocks, block_size=4, memory_bytes=5)
    )
    return handle


def assembly(*handles: RankHandle) -> Assembly:
    return Assembly(handles or (rank(0), rank(1), rank(2)), Timing(HOST, None))


def allocated(number: int, blocks: int = 40, corrupt: bool = False) -> bus.CacheAllocated:
    return bus.CacheAllocated(
        epoch=EPOCH, cache_id=f"cache of {number}", blocks=blocks, memory_bytes=100 + number, corrupt=corrupt
    )


def to_caches(attempt: Assembly, processes: Sequence[str] = (), now: float = 100.0, first: bool = True) -> list[Action]:
    """The rendezvous and the joining take a second each."""
    begun = attempt.begin(EPOCH, now, processes=processes, is_first=first)
    assert [(one.ranks, one.message) for one in begun if isinstance(one, actions.Ask)] == [
        ((0,), bus.Rendezvous(epoch=EPOCH))
    ]
    assert not attempt.has_joined
    [joining] = attempt.answered({0: bus.RendezvousOpened(epoch=EPOCH, address="shm:///x")}, now + 1)
    assert isinstance(joining, actions.Ask)
    assert (joining.ranks, joining.message) == (None, bus.Join(epoch=EPOCH, address="shm:///x"))
    return attempt.answered({number: bus.Joined(epoch=EPOCH, seconds=0.1) for number in range(3)}, now + 2)


def done(fingerprint: int = 7) -> dict[int, bus.StepDone]:
    return {0: bus.StepDone(epoch=EPOCH, step=1, seconds=0.1, fingerprint=fingerprint)}


def step_of(attempt: Assembly) -> Step:
    return attempt.step


def retry_of(attempt: Assembly) -> float | None:
    return attempt.retry_at


def spans(found: Sequence[Action]) -> list[tuple[TrailPhase, float]]:
    return [(one.phase, one.seconds) for one in found if isinstance(one, actions.PhaseOver)]


def kinds(found: Sequence[Action]) -> list[str]:
    return [type(one).__name__ for one in found]


def test_a_first_attempt_tests_and_warms_up_and_every_phase_is_timed() -> None:
    ranks = rank(0), rank(1), rank(2)
    attempt = assembly(*ranks)
    [allocate] = to_caches(attempt, now=1.0)
    assert isinstance(allocate, actions.AllocateCaches)
    assert (allocate.epoch, allocate.blocks, allocate.check) == (EPOCH, 40, False)
    joined = attempt.answered({number: allocated(number) for number in range(3)}, 5.5)
    assert kinds(joined) == ["PhaseOver", "ProcessesChanged", "RunStep"]
    assert joined[0] == actions.PhaseOver(
        TrailPhase.REBUILD, 4.5, "a new communicator, and 40 blocks of cache on each rank"
    )
    assert [(one.joined_epoch, one.memory_bytes) for one in ranks] == [(EPOCH, 100), (EPOCH, 101), (EPOCH, 102)]
    assert attempt.cache_ids == ("cache of 0", "cache of 1", "cache of 2")
    assert (attempt.has_joined, attempt.unverified, attempt.blocks) == (True, False, 40 - PROBE_BLOCKS)
    assert kinds(attempt.answered(done(), 6.0)) == ["RunStep"]
    assert step_of(attempt) is Step.WARMING
    assert spans(attempt.answered(done(), 12.0)) == [(TrailPhase.VERIFY, 6.5)]
    assert attempt.phases == {"rebuild": 4.5, "verify": 6.5}
    assert step_of(attempt) is Step.DONE


def test_a_later_attempt_with_the_same_processes_is_no_change_and_needs_no_warming_up() -> None:
    attempt = assembly()
    to_caches(attempt, processes=["0.1", "1.1", "2.1"], first=False)
    joined = attempt.answered({number: allocated(number) for number in range(3)}, 103.0)
    assert kinds(joined) == ["PhaseOver", "RunStep"]
    assert kinds(attempt.answered(done(), 104.0)) == ["PhaseOver"]
    assert step_of(attempt) is Step.DONE


@pytest.mark.parametrize("before", [["0.0", "1.1", "2.1"], ["0.1", "1.1", "2.9"]])
def test_one_other_process_changes_them(before: list[str]) -> None:
    attempt = assembly()
    to_caches(attempt, processes=before, first=False)
    assert "ProcessesChanged" in kinds(attempt.answered({number: allocated(number) for number in range(3)}, 103.0))


@pytest.mark.parametrize(("corrupt", "named"), [((), []), ((2,), [2]), ((1,), [1]), ((0, 2), []), ((0, 1, 2), [])])
def test_garbage_in_one_rank_s_cache_is_that_rank_s_and_in_several_nobody_s(
    corrupt: tuple[int, ...], named: list[int]
) -> None:
    attempt = assembly()
    attempt.unverified = True
    [allocate] = to_caches(attempt)
    assert isinstance(allocate, actions.AllocateCaches)
    assert allocate.check
    joined = attempt.answered({number: allocated(number, corrupt=number in corrupt) for number in range(3)}, 103.0)
    assert [one.rank for one in joined if isinstance(one, actions.AttributeNaN)] == named
    assert not attempt.unverified


def test_every_rank_gets_less_only_when_one_has_had_no_room_for_long_and_that_is_told_once() -> None:
    attempt = assembly()
    to_caches(attempt, now=100.0)
    short = {0: allocated(0), 1: allocated(1, blocks=20), 2: allocated(2)}
    assert attempt.answered(short, 103.0) == []
    assert not attempt.has_joined
    assert (retry_of(attempt) or 0.0) > 103.0
    [again] = attempt.allocate()
    assert isinstance(again, actions.AllocateCaches)
    assert (again.blocks, retry_of(attempt)) == (40, None)
    found = attempt.answered(short, 102.0 + ROOM_SECONDS)
    assert found == [actions.Log("a rank has no room for 40 blocks of cache: every rank gets 20")]
    [again] = attempt.allocate()
    assert isinstance(again, actions.AllocateCaches)
    assert again.blocks == 20


def test_a_proof_that_fails_names_what_differs() -> None:
    attempt = assembly()
    to_caches(attempt)
    attempt.answered({number: allocated(number) for number in range(3)}, 103.0)
    attempt.answered(done(), 104.0)
    attempt.answered(done(), 105.0)
    to_caches(attempt, processes=["0.1", "1.1", "2.1"], now=200.0, first=False)
    attempt.answered({number: allocated(number) for number in range(3)}, 203.0)
    for _ in range(RETESTS):
        assert kinds(attempt.answered(done(8), 204.0)) == ["RunStep"]  # the probe, again
    scrub = attempt.answered(done(8), 205.0)
    assert [(one.ranks, one.message) for one in scrub if isinstance(one, actions.Ask)] == [
        (None, bus.Scrub(epoch=EPOCH))
    ]
    assert step_of(attempt) is Step.SCRUBBING
    assert attempt.answered({number: bus.Scrubbed(epoch=EPOCH, tensors=0) for number in range(3)}, 206.0) == []
    assert step_of(attempt) is Step.WRONG
    assert attempt.wrong.startswith("the probe's fingerprint is 0000000000000008")
