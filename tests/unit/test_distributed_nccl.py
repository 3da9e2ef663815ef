"""The communicators of GPUs, with a stand-in for torch's own group: what is aborted, when, and what is raised then.

tests/gpu has the real one.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.support.wait import until
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from lockstep_runtime.config import ServeConfig
from lockstep_runtime.distributed import nccl
from lockstep_runtime.distributed.errors import CommunicatorAborted, CommunicatorError, CommunicatorStuckError
from lockstep_runtime.distributed.host_staged import HostStagedCommunicator
from lockstep_runtime.distributed.join import join, open_rendezvous
from lockstep_runtime.distributed.nccl import NcclCommunicator
from lockstep_runtime.distributed.shared_memory import SharedFile, SharedMemoryCommunicator
from lockstep_runtime.host.torch_environment import NCCL_VARIABLES

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
        self.broken: RuntimeError | None = None

    made: list[Edge]
    completes = True
    let_init_end: threading.Event
    init_fails: RuntimeError | None = None

    def eager_connect_single_device(self, device: torch.device) -> None:
        assert device == CPU
        assert Edge.let_init_end.wait(SECONDS)
        if Edge.init_fails is not None:
            raise Edge.init_fails

    def allreduce(self, tensors: list[Tensor], options: dist.AllreduceOptions) -> None:
        assert not options.asyncOp
        if self.broken:
            raise self.broken
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
    monkeypatch.setattr(Edge, "init_fails", None)
    monkeypatch.setattr(Edge, "let_init_end", threading.Event(), raising=False)
    Edge.let_init_end.set()
    for name, value in NCCL_VARIABLES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", Edge)
    monkeypatch.setattr(torch.cuda, "Event", Edge.Event)


def make(size: int = 2, seconds: float = SECONDS, cancelled: Callable[[], bool] = lambda: False) -> NcclCommunicator:
    return NcclCommunicator(HashStore(), 0, size, CPU, time.monotonic() + seconds, cancelled)


def test_sums_and_gathers_go_through_torchs_group() -> None:
    group = make()
    assert group.all_reduce(torch.ones(3)).tolist() == [2, 2, 2]
    parts = group.gather(torch.ones(1))
    assert parts is not None
    assert [part.item() for part in parts] == [1, 1]


def test_after_an_abort_everything_raises() -> None:
    group = make()
    group.release()
    for use in (group.check, lambda: group.all_reduce(torch.ones(1)), lambda: group.gather(torch.ones(1))):
        with pytest.raises(CommunicatorAborted):
            use()
    group.close()
    group.release()  # from the control thread, which may come late
    assert Edge.made[0].aborts == 1


def test_leaving_returns_at_once_however_long_nccl_takes_to_abort() -> None:
    group = make()
    Edge.made[0].let_abort_end.clear()
    group.release()
    with pytest.raises(CommunicatorAborted):
        group.check()
    group.release()
    Edge.made[0].let_abort_end.set()
    group.close()
    assert Edge.made[0].aborts == 1


def test_closing_waits_for_the_abort() -> None:
    """Else the next epoch's communicator would be made while this one's memory is still in use."""
    group = make()
    Edge.made[0].let_abort_end.clear()
    group.release()
    closing = threading.Thread(target=group.close)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive()
    Edge.made[0].let_abort_end.set()
    closing.join(SECONDS)
    assert not closing.is_alive()


def test_an_abort_that_does_not_end_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "FREE_SECONDS", 0.05)
    group = make()
    Edge.made[0].let_abort_end.clear()
    with pytest.raises(CommunicatorStuckError, match="has not freed an aborted communicator"):
        group.close()
    Edge.made[0].let_abort_end.set()


def test_an_abort_waits_for_a_collective_that_is_being_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's abort frees what an enqueue reads."""
    monkeypatch.setattr(nccl, "QUEUE_SECONDS", SECONDS)
    group, edge = make(), Edge.made[0]
    queueing, go_on = threading.Event(), threading.Event()

    def allreduce(tensors: list[Tensor], options: dist.AllreduceOptions) -> None:
        queueing.set()
        assert go_on.wait(SECONDS)
        assert not edge.aborts

    edge.allreduce = allreduce  # type: ignore[method-assign] # an instance of the edge's, not of ours
    with ThreadPoolExecutor(1) as pool:
        queued = pool.submit(group.all_reduce, torch.ones(1))
        assert queueing.wait(SECONDS)
        group.release()
        go_on.set()
        queued.result(SECONDS)
    group.close()
    assert edge.aborts == 1


def test_one_that_waits_for_room_on_the_device_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the abort makes room."""
    monkeypatch.setattr(nccl, "QUEUE_SECONDS", 0.02)
    group, edge = make(), Edge.made[0]

    def allreduce(tensors: list[Tensor], options: dist.AllreduceOptions) -> None:
        until("the abort has begun", lambda: edge.aborts == 1, SECONDS)
        raise dist.DistBackendError("NCCL communicator was aborted on rank 0")

    edge.allreduce = allreduce  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as pool:
        queued = pool.submit(group.all_reduce, torch.ones(1))
        until("it is being queued", lambda: group.is_queueing, SECONDS)
        group.release()
        with pytest.raises(CommunicatorAborted):
            queued.result(SECONDS)


def test_an_error_of_torchs_is_an_abort_only_when_there_was_one() -> None:
    group = make()
    Edge.made[0].broken = dist.DistBackendError("NCCL communicator was aborted on rank 0")
    with pytest.raises(CommunicatorError, match="NCCL communicator was aborted on rank 0") as found:
        group.all_reduce(torch.ones(1))
    assert not isinstance(found.value, CommunicatorAborted)
    Edge.made[0].broken = torch.AcceleratorError("CUDA error: invalid argument")
    with pytest.raises(torch.AcceleratorError):
        group.all_reduce(torch.ones(1))


def test_the_proofs_time_counts_from_when_it_begins() -> None:
    """An initialisation that took all of its time is not thrown away."""
    Edge.let_init_end.clear()
    begun = time.monotonic()
    threading.Timer(0.2, Edge.let_init_end.set).start()
    group = NcclCommunicator(HashStore(), 0, 2, CPU, begun + 60.0)
    assert time.monotonic() - begun >= 0.2
    assert group.all_reduce(torch.ones(1)).item() == 2


@pytest.mark.parametrize("cancelled", [True, False])
def test_an_initialisation_that_does_not_end_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, *, cancelled: bool
) -> None:
    """It has no time-out, and nothing ends it but the process."""
    monkeypatch.setattr(nccl, "LEAVE_SECONDS", 0.05)
    Edge.let_init_end.clear()
    with pytest.raises(CommunicatorStuckError, match="initialisation did not end"):
        make(seconds=SECONDS if cancelled else 0.05, cancelled=lambda: cancelled)
    assert Edge.made[0].aborts == 0  # which would wait for it
    Edge.let_init_end.set()


def test_an_initialisation_that_is_called_off_may_end_by_itself() -> None:
    Edge.let_init_end.clear()
    Edge.init_fails = dist.DistBackendError("NCCL error in: NCCLUtils.cpp:93, remote process exited")
    calls = iter([False, False, True])

    def cancelled() -> bool:
        if found := next(calls, True):
            Edge.let_init_end.set()
        return found

    with pytest.raises(dist.DistBackendError, match="remote process exited"):
        make(cancelled=cancelled)
    assert Edge.made[0].aborts == 1


def test_without_the_variables_that_keep_torch_from_ending_the_process_nothing_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", "0")
    monkeypatch.delenv("TORCH_FR_BUFFER_SIZE")
    with pytest.raises(
        CommunicatorError, match="set TORCH_NCCL_BLOCKING_WAIT=1 TORCH_FR_BUFFER_SIZE=0 before it starts"
    ):
        make()
    assert not Edge.made


def test_torch_knows_the_variables() -> None:
    """Each is read by the library that is installed: a name that torch gave up would do nothing."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    if not library.exists():
        pytest.skip("this torch is built without CUDA")
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as text:
        unknown = [name for name in NCCL_VARIABLES if text.find(name.encode() + b"\0") < 0]
        assert unknown == []
        assert text.find(b"TORCH_NCCL_BLOCKING_WAIT is enabled, NO watchdog thread is created.") >= 0


@pytest.mark.parametrize(
    ("size", "completes", "cancelled", "message"),
    [(3, True, False, "gave 2, not 3"), (2, False, False, "did not end in time"), (2, False, True, "called off")],
)
def test_what_fails_its_proof_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, size: int, completes: bool, cancelled: bool, message: str
) -> None:
    monkeypatch.setattr(nccl, "PROOF_SECONDS", SECONDS if cancelled else 0.05)
    Edge.completes = completes
    with pytest.raises(CommunicatorError, match=message):
        make(size, cancelled=lambda: cancelled)
    assert Edge.made[0].aborts == 1


def test_without_a_gpu_joining_fails_with_torchs_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here: tests/gpu joins for real")
    for name, value in NCCL_VARIABLES.items():
        monkeypatch.setenv(name, value)
    config = ServeConfig(model="m", served_name="m", tensor_parallel_size=2, ranks_per_pod=2, backend="nccl")
    meeting = open_rendezvous(config, 1)

    def rank(number: int) -> None:
        with pytest.raises(CommunicatorError, match=rf"rank {number} could not join epoch 1 at tcp://.*no GPUs found"):
            join(config, number, 1, meeting.address, timeout=SECONDS)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(rank, range(2)))
    meeting.close()


def test_ranks_that_share_a_gpu_meet_on_the_host() -> None:
    """CPU tensors stand in for the device's here."""
    meeting = SharedFile(2)

    def rank(number: int) -> tuple[list[float], list[list[float]] | None]:
        group = HostStagedCommunicator(SharedMemoryCommunicator(meeting.address, number, 2, timeout=SECONDS))
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


def test_backend_cpu_and_device_cuda_together_give_a_group_of_the_host() -> None:
    config = ServeConfig(
        model="m", served_name="m", tensor_parallel_size=2, ranks_per_pod=2, backend="cpu", device="cuda"
    )
    meeting = open_rendezvous(config, 1)
    assert meeting.address.startswith("shm://")
    with ThreadPoolExecutor(2) as pool:
        groups = list(pool.map(lambda rank: join(config, rank, 1, meeting.address, timeout=SECONDS), range(2)))
    assert [type(group) for group in groups] == [HostStagedCommunicator, HostStagedCommunicator]
    groups[0].release()
    with pytest.raises(CommunicatorAborted):
        groups[1].check()
    for group in groups:
        group.close()
