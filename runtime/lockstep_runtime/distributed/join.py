"""The ranks' communicator. `distributed.nccl` and `distributed.rendezvous_store` alone touch torch.distributed.

Three kinds behind one protocol: NCCL, with a GPU per rank; and for ranks on CPUs, where torch has gloo, shared memory
within a pod and TCP between pods.
Each is made for one epoch of the group and thrown away with it. A collective waits without limit, because only the
engine can tell a slow step from a hung one; `release` ends the wait.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from lockstep_runtime.config import TOKEN_VARIABLE, ServeConfig
from lockstep_runtime.distributed.communicator import Communicator, Rendezvous
from lockstep_runtime.distributed.errors import CommunicatorAborted, CommunicatorError
from lockstep_runtime.distributed.host_staged import HostStagedCommunicator
from lockstep_runtime.distributed.nccl import NcclCommunicator
from lockstep_runtime.distributed.networks import tell_networks
from lockstep_runtime.distributed.rendezvous import RendezvousClient, RendezvousServer
from lockstep_runtime.distributed.rendezvous_store import RendezvousStore
from lockstep_runtime.distributed.shared_memory import (
    SCHEME,
    SharedFile,
    SharedMemoryCommunicator,
    exchange_bytes,
    is_supported,
)
from lockstep_runtime.distributed.tcp import TcpCommunicator
from lockstep_runtime.host.addresses import loopback, route_to

__all__ = [
    "Communicator",
    "CommunicatorAborted",
    "CommunicatorError",
    "Rendezvous",
    "choose_backend",
    "exchange_reserve",
    "join",
    "join_seconds",
    "open_rendezvous",
]

JOIN_SECONDS: Final = 10.0  # the engine waits longer than these before it kills a rank that joins
# Where peers can't reach each other's memory: a segment of 33,030,528 bytes, and smaller ones (NCCL's environment
# documentation asks for a large /dev/shm; `Error while creating shared memory segment` names the size).
NCCL_SHARED_BYTES: Final = 64 * 1024 * 1024
NCCL_JOIN_SECONDS: Final = 120.0  # to the communicator; its proof has a time of its own

logger = logging.getLogger(__name__)


def choose_backend(config: ServeConfig) -> str:
    """'nccl' or 'cpu'. A rank never looks for a GPU by itself: one whose driver fails would continue alone on its CPU.
    The supervisor has resolved `auto` for all ranks (`accelerator.settle`)."""
    if config.backend == "auto":
        return "nccl" if config.device == "cuda" else "cpu"
    return config.backend


def join_seconds(config: ServeConfig) -> float:
    """How long joining may take. NCCL looks for its networks and loads its kernels first: a minute has been seen."""
    return NCCL_JOIN_SECONDS if choose_backend(config) == "nccl" else JOIN_SECONDS


def exchange_reserve(config: ServeConfig) -> int:
    """Bytes of /dev/shm that nothing else of the pod should take: for the ranks' exchange, or for NCCL's buffers."""
    if config.ranks_per_pod == 1:
        return 0
    if choose_backend(config) == "nccl":
        return config.ranks_per_pod * NCCL_SHARED_BYTES
    if config.pods > 1 or not is_supported():
        return 0
    return 3 * exchange_bytes(config.tensor_parallel_size)  # the last, which may still be mapped, this one and the next


def open_rendezvous(config: ServeConfig, epoch: int) -> Rendezvous:
    """On rank 0, open the rendezvous of an epoch. A single rank needs none.

    Raises:
        CommunicatorError: no room in shared memory, or the leader's own address is unknown.
    """
    if choose_backend(config) == "cpu" and config.pods == 1 and is_supported():
        try:
            return SharedFile(config.tensor_parallel_size)
        except CommunicatorError as error:
            logger.warning("the ranks exchange over TCP, which takes longer: %s", error)
    host = loopback() if config.pods == 1 else own_address(config.leader, time.monotonic() + 10.0)
    return RendezvousServer(host, config.tensor_parallel_size, _token())


def join(
    config: ServeConfig,
    rank: int,
    epoch: int,
    address: str,
    timeout: float,
    cancelled: Callable[[], bool] = lambda: False,
) -> Communicator:
    """Meet the other ranks there, and prove the communicator: an all-reduce of ones must give the group's size.

    `cancelled` is asked while the others are waited for.

    Raises:
        CommunicatorError: not everyone came within `timeout` seconds, it was cancelled, or the proof failed.
        CommunicatorStuckError: NCCL's initialisation can't be left; the process must end.
    """
    if config.tensor_parallel_size == 1:
        return SingleCommunicator()
    group = _meet(config, rank, epoch, address, timeout, cancelled)
    return HostStagedCommunicator(group) if config.device == "cuda" and choose_backend(config) == "cpu" else group


def _meet(
    config: ServeConfig, rank: int, epoch: int, address: str, timeout: float, cancelled: Callable[[], bool]
) -> Communicator:
    size = config.tensor_parallel_size
    if address.startswith(SCHEME):
        return SharedMemoryCommunicator(address, rank, size, timeout, cancelled)
    deadline = time.monotonic() + timeout
    try:
        meeting = RendezvousClient(address, rank, size, _token(), deadline, cancelled)
        if choose_backend(config) == "cpu":
            return TcpCommunicator(meeting)
        tell_networks()
        device = torch.device("cuda", rank % config.ranks_per_pod)
        with contextlib.closing(RendezvousStore(meeting)) as store:
            return NcclCommunicator(store, rank, size, device, deadline, cancelled)
    except (RuntimeError, OSError, ValueError) as error:  # torch raises subclasses of RuntimeError for all of it
        if isinstance(error, CommunicatorError):
            raise
        raise CommunicatorError(f"rank {rank} could not join epoch {epoch} at {address}: {error}") from error


class SingleCommunicator:
    """One rank alone."""

    rank = 0
    size = 1

    def __init__(self) -> None:
        self._aborted = False

    def all_reduce(self, tensor: Tensor, place: str = "") -> Tensor:
        self.check()
        return tensor

    def gather(self, tensor: Tensor, place: str = "") -> list[Tensor] | None:
        self.check()
        return [tensor]

    def check(self) -> None:
        if self._aborted:
            raise CommunicatorAborted("the communicator was aborted")

    def release(self) -> None:
        self._aborted = True

    def close(self) -> None:
        self.release()


def own_address(leader: str, deadline: float) -> str:
    """The address of this machine on the way to the leader; on the leader itself, the leader's. Of either family.

    The leader's name may not resolve yet when its pod is young, so it is asked for until the deadline.
    """
    while True:
        try:
            return route_to(leader)
        except OSError as error:
            if time.monotonic() > deadline:
                raise CommunicatorError(f"the leader's name {leader} does not resolve: {error}") from error
            time.sleep(0.1)


def _token() -> str:
    """The group's, which a worker always has."""
    return os.environ.get(TOKEN_VARIABLE, "")
