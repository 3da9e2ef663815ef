"""One wait until every rank is there: whose process is ended first, and what is waited for no longer."""

from __future__ import annotations

from collections.abc import Collection

from lockstep_runtime.protocol import bus
from lockstep_runtime.recovery.gathering import Gathering
from lockstep_runtime.recovery.rank_handle import RankHandle
from lockstep_runtime.recovery.timing import ABSENT_SECONDS, HOST, NCCL, Backend, Timing

BEGAN = 100.0


def leaving(rank: int) -> RankHandle:
    """A rank that was told at BEGAN to leave its collective, and hasn't."""
    handle = RankHandle(rank=rank, pod_index=rank)
    handle.arrive(
        bus.Hello(
            protocol=1, token="", role=bus.Role.WORKER, group=0, pod_index=rank, pod=f"pod-{rank}", node="n", pid=11,
            incarnation=f"{rank}.1", epoch=1, rank=rank,
        ),
        1,
        BEGAN - 50,
    )  # fmt: skip
    handle.set_loaded(
        bus.Loaded(seconds=1.0, weight_bytes=1, read_bytes=1, cache_blocks=4, block_size=4, memory_bytes=5)
    )
    handle.abort_sent_at = BEGAN
    return handle


def gathering(
    *handles: RankHandle,
    suspects: Collection[int] = (),
    unkillable: Collection[int] = (),
    abort_seconds: float = HOST.abort,
    backend: Backend = HOST,
) -> Gathering:
    return Gathering(
        handles=handles,
        timing=Timing(backend, None),
        since=BEGAN,
        has_served=True,
        abort_seconds=abort_seconds,
        suspects=frozenset(suspects),
        longest_load=1.0,
        can_kill=lambda handle: handle.rank not in unkillable,
    )


def late(found: Gathering, now: float) -> list[int]:
    return [handle.rank for handle, words in found.late(now) if "did not leave its collective" in words]


def test_the_straggler_goes_first_and_the_others_get_the_same_time_again() -> None:
    found = gathering(leaving(0), leaving(1), leaving(2), suspects={1})
    assert late(found, BEGAN + HOST.abort - 0.1) == []
    assert late(found, BEGAN + HOST.abort) == [1]
    assert late(found, BEGAN + 2 * HOST.abort - 0.1) == [1]
    assert late(found, BEGAN + 2 * HOST.abort) == [1], "each time the straggler is late the others only waited for it"


def test_without_a_straggler_all_that_are_late_go_at_once() -> None:
    assert late(gathering(leaving(0), leaving(1)), BEGAN + HOST.abort) == [0, 1]
    assert late(gathering(leaving(0), leaving(1), suspects={0, 1}), BEGAN + HOST.abort) == [0, 1]
    assert late(gathering(leaving(0), leaving(1), suspects={2}), BEGAN + HOST.abort) == [0, 1]


def test_a_straggler_that_nobody_can_end_keeps_nobody_alive() -> None:
    found = gathering(leaving(0), leaving(1), leaving(2), suspects={1}, unkillable={1})
    assert late(found, BEGAN + HOST.abort) == [0, 2]


def test_a_rank_that_nobody_can_end_is_waited_for_as_for_one_that_is_out_of_reach() -> None:
    found = gathering(leaving(0), unkillable={0})
    assert found.hopeless(BEGAN + ABSENT_SECONDS - 0.1) is None
    evidence = found.hopeless(BEGAN + ABSENT_SECONDS)
    assert evidence is not None
    assert "did not leave its collective within 60 s, and its supervisor is out of reach" in evidence.message


def test_and_twice_as_long_as_leaving_may_take_where_that_is_longer() -> None:
    seconds = NCCL.abort_joining
    found = gathering(leaving(0), unkillable={0}, abort_seconds=seconds, backend=NCCL)
    assert found.hopeless(BEGAN + 2 * seconds - 0.1) is None
    assert found.hopeless(BEGAN + 2 * seconds) is not None
