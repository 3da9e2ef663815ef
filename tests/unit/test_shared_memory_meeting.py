"""Meeting in shared memory: who waits for a rank that does not come can be called off."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from lockstep_runtime.config import ServeConfig
from lockstep_runtime.distributed import join
from lockstep_runtime.distributed.errors import CommunicatorAborted, CommunicatorError
from lockstep_runtime.distributed.shared_memory import SharedFile, SharedMemoryCommunicator
from lockstep_runtime.distributed.traced import TracedCommunicator
from lockstep_runtime.protocol.progress_record import Progress, Record, new_memory


def test_a_meeting_that_is_called_off_is_left_at_once() -> None:
    place, cancelled = SharedFile(2), threading.Event()
    threading.Timer(0.1, cancelled.set).start()
    begun = time.monotonic()
    with pytest.raises(CommunicatorAborted, match="called off"):
        SharedMemoryCommunicator(place.address, 0, 2, 60.0, cancelled.is_set)
    assert time.monotonic() - begun < 30
    place.close()


def test_a_rank_that_does_not_come_is_named() -> None:
    place = SharedFile(2)
    with pytest.raises(CommunicatorError, match="rank 1 did not join in time"):
        SharedMemoryCommunicator(place.address, 0, 2, 0.05)
    place.close()


def test_ranks_that_meet_are_watched_in_every_collective() -> None:
    config = ServeConfig(model="toy", served_name="toy", tensor_parallel_size=2, ranks_per_pod=2, backend="cpu")
    rendezvous = join.open_rendezvous(config, 1)
    records: dict[int, Record] = {}
    sums: dict[int, list[float]] = {}

    def live(rank: int) -> None:
        progress = Progress(new_memory(f"rank-{rank}"))
        watched = TracedCommunicator(join.join(config, rank, 1, rendezvous.address, 30.0, lambda: False), progress)
        progress.enter(1, 7)
        sums[rank] = watched.all_reduce(torch.full((3,), float(rank + 1)), "layers.0.mlp.down_proj").tolist()
        records[rank] = progress.read()

    threads = [threading.Thread(target=live, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sums == {0: [3.0] * 3, 1: [3.0] * 3}
    for record in records.values():
        assert (record.collective, record.inside, record.place) == (1, False, "layers.0.mlp.down_proj")
