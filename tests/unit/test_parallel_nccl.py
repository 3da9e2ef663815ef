"""The communicators of GPUs, with a stand-in for torch's own group: what is aborted, when, and what is raised then.

tests/gpu has the real one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from tests.support.wait import until
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from lockstep_runtime.config import ServeConfig
from lockstep_runtime.parallel.errors import GroupAborted, GroupError
from lockstep_runtime.parallel.group import join, open_rendezvous
from lockstep_runtime.parallel.host import HostGroup
from lockstep_runtime.parallel.nccl import NcclGroup
from lockstep_runtime.parallel.shared_memory import SharedFile, SharedMemoryGroup

SECONDS = 10.0
CPU = torch.device("cpu")


class Edge:
    """torch's process group and event, of a group of two whose other rank has ones too."""

    Options = dist.ProcessGroupNCCL.Options

    def __init__(self, *_: object) -> None:
        Edge.made.append(self)
        self.aborts = 0
        self.let_abort_end = threading.Event()
        self.let_abort_end.set()
        self.broken = False

    made: list[Edge]
    completes = True

    def eager_connect_single_device(self, device: torch.device) -> None:
        assert device == CPU

    def allreduce(self, tensors: list[Tensor], options: dist.AllreduceOptions) -> None:
        assert not options.asyncOp
        if self.broken:
            raise RuntimeError("NCCL communicator was aborted on rank 0")
        tensors[0].mul_(2)

    def gather(self, parts: list[list[Tensor]], tensors: list[Tensor], options: dist.GatherOptions) -> None:
        assert options.rootRank == 0
        for part in parts[0] if parts else ():
            part.copy_(tensors[0])

    def abort(self) -> None:
        self.aborts += 1
        assert self.let_abort_end.wait(SECONDS)

    class Event:
        def record(self) -> None:
            pass

        def query(self) -> bool:
            return Edge.completes


@pytest.fixture(autouse=True)
def edge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Edge, "made", [], raising=False)
    monkeypatch.setattr(Edge, "completes", True)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", Edge)
    monkeypatch.setattr(torch.cuda, "Event", Edge.Event)


def make(size: int = 2, seconds: float = SECONDS, cancelled: Callable[[], bool] = lambda: False) -> NcclGroup:
    return NcclGroup(HashStore(), 0, size, CPU, time.monotonic() + seconds, cancelled)


def test_sums_and_gathers_go_through_torchs_group() -> None:
    group = make()
    assert group.all_reduce(torch.ones(3)).tolist() == [2, 2, 2]
    parts = group.gather(torch.ones(1))
    assert parts is not None
    assert [part.item() for part in parts] == [1, 1]


def test_after_an_abort_everything_raises() -> None:
    group = make()
    group.abort()
    for use in (group.check, lambda: group.all_reduce(torch.ones(1)), lambda: group.gather(torch.ones(1))):
        with pytest.raises(GroupAborted):
            use()
    group.close()
    assert Edge.made[0].aborts == 1


def test_the_second_to_abort_waits_for_the_first() -> None:
    """Else the next epoch's communicator would be made while this one's memory is still in use."""
    group = make()
    Edge.made[0].let_abort_end.clear()
    first = threading.Thread(target=group.abort)
    second = threading.Thread(target=group.close)
    first.start()
    until("it is called off", lambda: Edge.made[0].aborts == 1, SECONDS)
    second.start()
    second.join(0.2)
    assert second.is_alive()
    with pytest.raises(GroupAborted):
        group.check()  # while it is under way, too
    Edge.made[0].let_abort_end.set()
    for thread in (first, second):
        thread.join(SECONDS)
        assert not thread.is_alive()
    assert Edge.made[0].aborts == 1


def test_an_error_of_torchs_is_an_abort_only_when_there_was_one() -> None:
    group = make()
    Edge.made[0].broken = True
    with pytest.raises(RuntimeError, match="NCCL communicator was aborted on rank 0"):
        group.all_reduce(torch.ones(1))


@pytest.mark.parametrize(
    ("size", "completes", "cancelled", "message"),
    [(3, True, False, "gave 2, not 3"), (2, False, False, "did not end in time"), (2, False, True, "called off")],
)
def test_what_fails_its_proof_leaves_nothing(size: int, completes: bool, cancelled: bool, message: str) -> None:
    Edge.completes = completes
    with pytest.raises(GroupError, match=message):
        make(size, seconds=SECONDS if cancelled else 0.05, cancelled=lambda: cancelled)
    assert Edge.made[0].aborts == 1


def test_without_a_gpu_joining_fails_with_torchs_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here: tests/gpu joins for real")
    config = ServeConfig(model="m", served_name="m", tensor_parallel_size=2, ranks_per_pod=2, backend="nccl")
    meeting = open_rendezvous(config, 1)
    with pytest.raises(GroupError, match=r"rank 0 could not join epoch 1 at tcp://.*no GPUs found"):
        join(config, 0, 1, meeting.address, timeout=SECONDS)
    meeting.close()


def test_ranks_that_share_a_gpu_meet_on_the_host() -> None:
    """CPU tensors stand in for the device's here."""
    meeting = SharedFile(2)

    def rank(number: int) -> tuple[list[float], list[list[float]] | None]:
        group = HostGroup(SharedMemoryGroup(meeting.address, number, 2, timeout=SECONDS))
        tensor = torch.tensor([1.0, 2.0]) * (number + 1)
        parts = group.gather(tensor)
        total = group.all_reduce(tensor)
        assert total is tensor
        group.check()
        return total.tolist(), None if parts is None else [part.tolist() for part in parts]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(rank, range(2))
    assert first == ([3.0, 6.0], [[1.0, 2.0], [2.0, 4.0]])
    assert second == ([3.0, 6.0], None)


def test_gloo_and_cuda_together_give_a_group_of_the_host() -> None:
    config = ServeConfig(
        model="m", served_name="m", tensor_parallel_size=2, ranks_per_pod=2, backend="gloo", device="cuda"
    )
    meeting = open_rendezvous(config, 1)
    assert meeting.address.startswith("shm://")
    with ThreadPoolExecutor(2) as pool:
        groups = list(pool.map(lambda rank: join(config, rank, 1, meeting.address, timeout=SECONDS), range(2)))
    assert [type(group) for group in groups] == [HostGroup, HostGroup]
    groups[0].abort()
    with pytest.raises(GroupAborted):
        groups[1].check()
    for group in groups:
        group.close()
