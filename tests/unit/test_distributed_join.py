"""Communicators between real processes."""

from __future__ import annotations

import functools
import multiprocessing
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.wait import until

from lockstep_runtime.config import ServeConfig
from lockstep_runtime.distributed.communicator import Communicator
from lockstep_runtime.distributed.host_collectives import PIECE_BYTES, HostCommunicator
from lockstep_runtime.distributed.join import CommunicatorAborted, CommunicatorError, join, open_rendezvous
from lockstep_runtime.distributed.shared_memory import SharedFile, SharedMemoryCommunicator

KINDS = ["shared memory", "TCP"]
Job = Callable[[Communicator], Any]


def config(kind: str, size: int) -> ServeConfig:
    return ServeConfig(
        model="none", served_name="none", tensor_parallel_size=size, backend="cpu",
        ranks_per_pod=size if kind == "shared memory" else 1,
    )  # fmt: skip


def member(pipe: Connection, kind: str, size: int, rank: int, address: str, job: Job) -> None:
    torch.set_num_threads(1)
    group = join(config(kind, size), rank, 1, address, timeout=60)
    pipe.send(job(group))


def run(kind: str, size: int, job: Job) -> list[Any]:
    """What every rank's job returned; the ranks are processes of their own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lockstep_runtime.distributed.join"])  # torch takes seconds: once is enough
    meeting = open_rendezvous(config(kind, size), 1)
    pipes, processes = [], []
    for rank in range(size):
        mine, theirs = context.Pipe()
        process = context.Process(target=member, args=(theirs, kind, size, rank, meeting.address, job))
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    try:
        return [pipe.recv() if pipe.poll(120) else "no answer" for pipe in pipes]
    finally:
        meeting.close()
        for process in processes:
            process.join(10)
            process.kill()


def sums_and_gathers(group: Communicator) -> Any:
    results = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for shape in ((1,), (3, 5), (2, PIECE_BYTES // 4 + 1)):
            generator = torch.Generator().manual_seed(group.rank)
            tensor = torch.randn(*shape, generator=generator).to(dtype)
            parts = group.gather(tensor)
            total = group.all_reduce(tensor.clone())
            if parts is not None:
                torch.testing.assert_close(total, sum(parts[1:], parts[0]), rtol=0.02, atol=0.02)
                assert parts[0].equal(tensor)
            results.append(total.double().sum().item())
    return type(group).__name__, results


@pytest.mark.parametrize(("kind", "size"), [("shared memory", 2), ("shared memory", 5), ("TCP", 3)])
def test_every_rank_gets_the_same_bits(kind: str, size: int) -> None:
    results = run(kind, size, sums_and_gathers)
    assert results[0][0] == ("SharedMemoryCommunicator" if kind == "shared memory" else "TcpCommunicator")
    assert all(result == results[0] for result in results)


def blocked_then_aborted(group: Communicator) -> Any:
    """The last rank never comes; every other is released by its own abort from another thread."""
    if group.rank == group.size - 1:
        time.sleep(3)
        return "late"
    threading.Timer(0.3, group.release).start()
    try:
        group.all_reduce(torch.ones(100))
    except CommunicatorAborted:
        group.release()
        try:
            group.gather(torch.ones(1))
        except CommunicatorAborted:
            return "released"
    return "not released"


@pytest.mark.parametrize("kind", KINDS)
def test_abort_releases_a_rank_that_waits(kind: str) -> None:
    assert run(kind, 3, blocked_then_aborted) == ["released", "released", "late"]


def say_who_is_waited_for(folder: Path, group: Communicator) -> Any:
    """Rank 1 comes when the others have said, by a file each, that they wait for it."""
    assert isinstance(group, HostCommunicator)
    told: list[int | None] = []

    def note(rank: int | None) -> None:
        told.append(rank)
        if rank == 1:
            (folder / str(group.rank)).touch()

    group.on_wait = note
    if group.rank == 1:
        until("the others wait", lambda: {file.name for file in folder.iterdir()} == {"0", "2"}, 60)
    group.all_reduce(torch.ones(3))
    return told[-1:]


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_waits_says_for_whom(kind: str, tmp_path: Path) -> None:
    first, _, last = run(kind, 3, functools.partial(say_who_is_waited_for, tmp_path))
    assert first == last == [None]


@pytest.mark.parametrize("kind", KINDS)
def test_joining_has_a_deadline(kind: str) -> None:
    lonely = config(kind, 2)
    meeting = open_rendezvous(lonely, 1)
    started = time.monotonic()
    with pytest.raises(CommunicatorError):
        join(lonely, 0, 1, meeting.address, timeout=1.0)
    meeting.close()
    assert time.monotonic() - started < 20


def test_nothing_is_left_in_shared_memory() -> None:
    meeting = SharedFile(2)
    assert meeting.path.exists()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda rank: SharedMemoryCommunicator(meeting.address, rank, 2, timeout=30), range(2)))
    assert not meeting.path.exists()
    meeting.close()
    with pytest.raises(CommunicatorError, match="can't be opened"):
        SharedMemoryCommunicator(meeting.address, 0, 2, timeout=5)


def test_only_a_meeting_place_of_the_right_kind_is_mapped(tmp_path: Path) -> None:
    with pytest.raises(CommunicatorError, match="is not in"):
        SharedMemoryCommunicator(f"shm://{tmp_path}/x", 0, 1, timeout=1)
    meeting = SharedFile(2)
    with pytest.raises(CommunicatorError, match="not the"):
        SharedMemoryCommunicator(meeting.address, 0, 3, timeout=1)
    meeting.close()


def test_one_rank_alone() -> None:
    group = join(config("TCP", 1), 0, 1, "tcp://nowhere:1", timeout=1)
    tensor = torch.ones(3)
    assert group.all_reduce(tensor).equal(torch.ones(3))
    assert group.gather(tensor) == [tensor]
    group.release()
    with pytest.raises(CommunicatorAborted):
        group.all_reduce(tensor)
