"""The ranks' communicator. This and `parallel.nccl` are the only modules that touch torch.distributed.

Three kinds behind one protocol: NCCL, with a GPU per rank; and for ranks on CPUs, where torch has gloo, shared memory
within a pod and TCP between pods.
Each is made for one epoch of the group and thrown away with it. A collective waits without limit, because only the
engine can tell a slow step from a hung one; `abort` ends the wait.
"""

from __future__ import annotations

import datetime
import os
import socket
import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from lockstep_runtime.config import TOKEN_VARIABLE, ServeConfig
from lockstep_runtime.parallel.errors import GroupAborted, GroupError
from lockstep_runtime.parallel.host import HostGroup
from lockstep_runtime.parallel.meeting import Meeting, MeetingPlace
from lockstep_runtime.parallel.nccl import NcclGroup
from lockstep_runtime.parallel.shared_memory import SCHEME, SharedFile, SharedMemoryGroup, is_supported
from lockstep_runtime.parallel.tcp import TcpGroup

__all__ = ["Group", "GroupAborted", "GroupError", "Rendezvous", "choose_backend", "join", "open_rendezvous"]


class Rendezvous(Protocol):
    """Rank 0's meeting place of one epoch. It may be closed when every rank has joined, or when it is given up."""

    @property
    def address(self) -> str:
        """tcp://host:port or shm://path."""

    def close(self) -> None: ...


class Group(Protocol):
    """One rank's end of the communicator. `place` names the caller, for who watches it (`parallel.watched`)."""

    rank: int
    size: int

    def all_reduce(self, tensor: Tensor, place: str = "") -> Tensor:
        """Sum over ranks, in place, the same bits on every rank. `tensor` is contiguous."""

    def gather(self, tensor: Tensor, place: str = "") -> list[Tensor] | None:
        """Every rank's tensor (all of one shape), in rank order, on rank 0; None elsewhere."""

    def check(self) -> None:
        """Raise GroupAborted if it was aborted: on a GPU collectives return before they are done."""

    def abort(self) -> None:
        """From any thread, any number of times: a collective that is waiting raises GroupAborted."""

    def close(self) -> None:
        """Give back what it holds; not from within a collective."""


def choose_backend(config: ServeConfig) -> str:
    """'nccl' or 'gloo': what `auto` means on this machine."""
    if config.backend == "auto":
        return "nccl" if config.device != "cpu" and torch.cuda.is_available() else "gloo"
    return config.backend


def open_rendezvous(config: ServeConfig, epoch: int) -> Rendezvous:
    """Rank 0 opens the meeting place of an epoch. One rank alone meets nobody.

    Raises:
        GroupError: no room in shared memory, or the leader's own address can't be told.
    """
    gloo = choose_backend(config) == "gloo"
    if gloo and config.pods == 1 and is_supported():
        return SharedFile(config.tensor_parallel_size)
    host = own_address(config.leader, time.monotonic() + 10.0)
    return MeetingPlace(host, config.tensor_parallel_size, _token()) if gloo else StoreServer(host)


def join(
    config: ServeConfig,
    rank: int,
    epoch: int,
    address: str,
    timeout: float,
    cancelled: Callable[[], bool] = lambda: False,
) -> Group:
    """Meet the other ranks there, and prove the communicator: an all-reduce of ones must give the group's size.

    `cancelled` is asked while the others are waited for; of NCCL's communicator, only in its proof.

    Raises:
        GroupError: not everyone came within `timeout` seconds, it was cancelled, or the proof failed.
    """
    if config.tensor_parallel_size == 1:
        return SingleGroup()
    group = _meet(config, rank, epoch, address, timeout, cancelled)
    return HostGroup(group) if config.device == "cuda" and choose_backend(config) == "gloo" else group


def _meet(
    config: ServeConfig, rank: int, epoch: int, address: str, timeout: float, cancelled: Callable[[], bool]
) -> Group:
    size = config.tensor_parallel_size
    if address.startswith(SCHEME):
        return SharedMemoryGroup(address, rank, size, timeout, cancelled)
    deadline = time.monotonic() + timeout
    try:
        if choose_backend(config) == "gloo":
            return TcpGroup(Meeting(address, rank, size, _token(), deadline, cancelled))
        device = torch.device("cuda", rank % config.ranks_per_pod)
        return NcclGroup(_connect(address, epoch, deadline), rank, size, device, deadline, cancelled)
    except (RuntimeError, OSError, ValueError) as error:  # torch raises subclasses of RuntimeError for all of it
        if isinstance(error, GroupError):
            raise
        raise GroupError(f"rank {rank} could not join epoch {epoch} at {address}: {error}") from error


class SingleGroup:
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
            raise GroupAborted("the communicator was aborted")

    def abort(self) -> None:
        self._aborted = True

    def close(self) -> None:
        self.abort()


class StoreServer:
    """torch's key-value store, in which NCCL's ranks meet, listening on this pod's address only."""

    def __init__(self, host: str) -> None:
        with socket.create_server((host, 0)) as listener:
            port = listener.getsockname()[1]
            self._store: TCPStore | None = TCPStore(
                host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
            )
        self.address = f"tcp://{host}:{port}"

    def close(self) -> None:
        self._store = None  # its last reference ends the server


def own_address(leader: str, deadline: float) -> str:
    """The address of this machine on the way to the leader; on the leader itself, the leader's.

    The leader's name may not resolve yet when its pod is young, so it is asked for until the deadline.
    """
    while True:
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((leader, 9))  # UDP: chooses a route, sends nothing
                return str(probe.getsockname()[0])
        except OSError as error:
            if time.monotonic() > deadline:
                raise GroupError(f"the leader's name {leader} does not resolve: {error}") from error
            time.sleep(0.1)


def _token() -> str:
    """The group's, which a worker always has."""
    return os.environ.get(TOKEN_VARIABLE, "")


def _connect(address: str, epoch: int, deadline: float) -> Store:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    store = TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=_remaining(deadline))
    return PrefixStore(f"epoch-{epoch}", store)


def _remaining(deadline: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=max(0.1, deadline - time.monotonic()))
