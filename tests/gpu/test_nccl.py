"""NCCL for real: an abort from another thread, a new communicator, and its use; a lost context; no time limit.

NCCL refuses two ranks on one GPU, so most of it is done with one rank, and the rest where there are two GPUs.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from tests.support.gpu import MIB, in_child, in_children
from torch._C._distributed_c10d import HashStore, PrefixStore, Store

from lockstep_runtime.chaos.device_faults import provoke
from lockstep_runtime.config import ServeConfig
from lockstep_runtime.distributed.communicator import Communicator
from lockstep_runtime.distributed.errors import CommunicatorAborted
from lockstep_runtime.distributed.join import join, open_rendezvous
from lockstep_runtime.distributed.nccl import NcclCommunicator
from lockstep_runtime.distributed.rendezvous import RendezvousClient, RendezvousServer
from lockstep_runtime.distributed.rendezvous_store import RendezvousStore
from lockstep_runtime.protocol.chaos import Injection
from lockstep_runtime.protocol.status import Fault
from lockstep_runtime.worker.fault_classifier import classify

DEVICE = torch.device("cuda", 0)
EPOCHS = 6
JOIN_SECONDS = 30.0
ABORT_SECONDS = 10.0


def alone(store: Store, epoch: int, seconds: float = JOIN_SECONDS) -> NcclCommunicator:
    return NcclCommunicator(PrefixStore(f"epoch-{epoch}", store), 0, 1, DEVICE, time.monotonic() + seconds)


def work_on_gpu(seconds: float) -> None:
    """Queue a kernel that keeps the device busy for about so long."""
    cycles = 50_000_000
    torch.cuda.synchronize()
    begun = time.monotonic()
    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    torch.cuda._sleep(int(cycles * seconds / (time.monotonic() - begun)))  # type: ignore[no-untyped-call]


def abort_and_rebuild() -> list[tuple[float, int]]:
    """For each epoch: the seconds that the abort took, from another thread and with work queued, and what was free."""
    store, found = HashStore(), []
    for epoch in range(EPOCHS):
        group = alone(store, epoch)
        assert group.all_reduce(torch.arange(4.0, device=DEVICE)).tolist() == [0, 1, 2, 3]
        parts = group.gather(torch.ones(3, device=DEVICE))
        assert parts is not None
        assert parts[0].tolist() == [1, 1, 1]
        work_on_gpu(0.5)
        queued = group.all_reduce(torch.ones(1 << 20, device=DEVICE))
        begun = time.monotonic()
        control = threading.Thread(target=group.release)
        control.start()
        queued.sum().item()  # as a step that waits for its result; what it holds means nothing now
        group.close()
        seconds = time.monotonic() - begun
        control.join()
        with pytest.raises(CommunicatorAborted):
            group.check()
        with pytest.raises(CommunicatorAborted):
            group.all_reduce(torch.ones(1, device=DEVICE))
        del group
        found.append((seconds, torch.cuda.mem_get_info(0)[0]))
    return found


def test_a_communicator_is_aborted_from_another_thread_and_made_anew() -> None:
    found = in_child(abort_and_rebuild)
    print("abort s:", [round(seconds, 3) for seconds, _ in found])
    assert all(seconds < ABORT_SECONDS for seconds, _ in found)
    free = [one for _, one in found]
    assert free[-1] > free[1] - 64 * MIB, "every epoch leaves memory behind"


def long_work(seconds: float) -> float:
    """A collective that waits longer than its meeting might have."""
    group = alone(HashStore(), 1, seconds / 2)
    work_on_gpu(seconds)
    group.all_reduce(torch.ones(1, device=DEVICE)).item()
    time.sleep(2.0)  # torch's watchdog looks every second at most
    return float(group.all_reduce(torch.ones(1, device=DEVICE)).item())


def test_a_collective_may_take_longer_than_the_meeting() -> None:
    assert in_child(long_work, 5.0) == 1.0


def lose_context(kind: Injection) -> tuple[Fault, str]:
    """The fault as a worker would report it, from a process that lives to tell."""
    group = alone(HashStore(), 1)
    provoke(kind)
    try:
        for _ in range(100):  # it shows in whatever comes next
            group.all_reduce(torch.ones(1, device=DEVICE)).item()
    except RuntimeError as error:
        time.sleep(3.0)  # torch's watchdog has met the error, too
        threading.Thread(target=group.release, daemon=True).start()
        return classify(error)
    raise AssertionError("the context was not lost")


@pytest.mark.parametrize("kind", [Injection.DEVICE_ASSERT, Injection.ILLEGAL_ACCESS])
def test_a_lost_context_is_reported_by_a_process_that_torch_leaves_alive(kind: Injection) -> None:
    fault, message = in_child(lose_context, kind)
    assert fault is Fault.CONTEXT_FAULT, message
    assert "\n" not in message


def pair(rank: int, addresses: list[str]) -> list[Any]:
    """Rank 1 stays away from the second collective of the first epoch; rank 0 is released by its own abort."""
    config = ServeConfig(model="m", served_name="m", tensor_parallel_size=2, ranks_per_pod=2, backend="nccl")
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    found: list[Any] = []
    for epoch, address in enumerate(addresses):
        group: Communicator = join(config, rank, epoch, address, timeout=JOIN_SECONDS)
        found.append(group.all_reduce(torch.ones(5, device=device)).tolist())
        begun = time.monotonic()
        if epoch == 0 and rank == 0:
            control = threading.Timer(0.5, group.release)
            control.start()
            group.all_reduce(torch.ones(1 << 20, device=device)).sum().item()
            control.join()
            with pytest.raises(CommunicatorAborted):
                group.check()
            found.append(round(time.monotonic() - begun, 2))
        elif epoch == 0:
            time.sleep(2.0)
        group.close()
    return found


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a GPU for each of two ranks")
def test_a_rank_that_waits_for_a_peer_is_released_by_its_own_abort() -> None:
    config = ServeConfig(model="m", served_name="m", tensor_parallel_size=2, ranks_per_pod=2, backend="nccl")
    meetings = [open_rendezvous(config, epoch) for epoch in range(2)]
    addresses = [meeting.address for meeting in meetings]
    first, second = in_children(pair, [(0, addresses), (1, addresses)])
    for meeting in meetings:
        meeting.close()
    assert (first[0], first[2]) == ([2.0] * 5, [2.0] * 5)
    assert second == [[2.0] * 5, [2.0] * 5]
    assert first[1] < ABORT_SECONDS


def test_it_meets_in_our_own_store() -> None:
    """As in a pod: at rank 0's meeting place, with the group's token."""
    assert in_child(meet) == [1.0, 1.0]


def meet() -> list[float]:
    place = RendezvousServer("127.0.0.1", 1, "a token")
    store = RendezvousStore(RendezvousClient(place.address, 0, 1, "a token", time.monotonic() + JOIN_SECONDS))
    group = NcclCommunicator(store, 0, 1, DEVICE, time.monotonic() + JOIN_SECONDS)
    store.close()  # as `join` does, when the communicator has been proved
    return [float(one) for one in group.all_reduce(torch.ones(2, device=DEVICE)).tolist()]
