"""The store in which NCCL's ranks meet, used by torch itself: gloo meets in it here, which asks for more than NCCL."""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lockstep_runtime.distributed.errors import CommunicatorAborted, CommunicatorError
from lockstep_runtime.distributed.rendezvous import RendezvousClient, RendezvousServer
from lockstep_runtime.distributed.rendezvous_store import ENTRY_BYTES, RendezvousStore

SECONDS = 20.0
TOKEN = "a token"


def run(
    size: int, work: Callable[[int, RendezvousStore], Any], cancelled: Callable[[], bool] = lambda: False
) -> list[Any]:
    """What each rank makes of its end of the store."""
    place = RendezvousServer("127.0.0.1", size, TOKEN)

    def rank(number: int) -> Any:
        meeting = RendezvousClient(place.address, number, size, TOKEN, time.monotonic() + SECONDS, cancelled)
        store = RendezvousStore(meeting)
        try:
            return work(number, store)
        finally:
            store.close()

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(rank, range(size)))


def test_torch_meets_in_it() -> None:
    def work(rank: int, store: RendezvousStore) -> list[float]:
        group: Any = dist.ProcessGroupGloo(store, rank, 3, datetime.timedelta(seconds=SECONDS))
        tensor = torch.full((2,), float(rank + 1))
        group.allreduce([tensor]).wait()
        return [float(one) for one in tensor]

    assert run(3, work) == [[6.0, 6.0]] * 3


def test_what_rank_0_sets_the_others_get_however_late_they_ask() -> None:
    """As NCCL's unique id: 128 bytes, of any value. Rank 0 may have left by then."""
    unique = bytes(range(128))

    def work(rank: int, store: RendezvousStore) -> bytes:
        if rank == 0:
            store.set("0", unique)
            return unique
        return store.get("0")

    assert run(4, work) == [unique] * 4


def test_every_root_of_a_large_group_is_heard() -> None:
    def work(rank: int, store: RendezvousStore) -> list[bytes]:
        store.set(f"UniqueNCCLID:{rank}", str(rank))
        found = store.multi_get([f"UniqueNCCLID:{other}" for other in range(3)])
        together.wait(SECONDS)
        return found

    together = threading.Barrier(3)
    assert run(3, work) == [[b"0", b"1", b"2"]] * 3


def test_who_waits_hears_that_a_rank_has_left() -> None:
    def work(rank: int, store: RendezvousStore) -> None:
        if rank == 1:
            with pytest.raises(CommunicatorError, match="rank 0 left before the communicator was made"):
                store.get("0")

    run(2, work)


def test_a_wait_ends_when_the_meeting_is_called_off_or_its_time_is_over() -> None:
    called_off = threading.Event()
    together = threading.Barrier(2)

    def work(rank: int, store: RendezvousStore) -> None:
        if rank == 0:
            with pytest.raises(CommunicatorError, match="nobody has set it"):
                store.wait(["it"], datetime.timedelta(seconds=0.05))
            called_off.set()
        else:
            with pytest.raises(CommunicatorAborted, match="called off"):
                store.get("it")
        together.wait(SECONDS)

    run(2, work, called_off.is_set)


def test_an_entry_has_a_bound() -> None:
    def work(rank: int, store: RendezvousStore) -> None:
        if rank == 0:
            with pytest.raises(CommunicatorError, match="a store's entry of"):
                store.set("it", b"x" * ENTRY_BYTES)

    run(2, work)


def test_who_does_not_know_the_token_is_not_let_in() -> None:
    """torch's own store lets in whoever reaches its port."""
    place = RendezvousServer("127.0.0.1", 2, TOKEN)
    stranger = RendezvousClient(place.address, 1, 2, "another token", time.monotonic() + 0.3)
    with pytest.raises((CommunicatorError, OSError, ValueError)):
        RendezvousStore(stranger)
    place.close()
