"""One GPU per rank: NCCL.

torch's process group is used as an object of our own, never as the default group: an abort concerns this object and no
global state, so that it may come from another thread while the next epoch's group is about to be made.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from lockstep_runtime.parallel.errors import GroupAborted, GroupError, check_proof

WITHOUT_LIMIT: Final = datetime.timedelta(days=30)
PROOF_PAUSE_SECONDS: Final = 0.001
# What goes wrong is the engine's to handle. torch would end the process: for a collective's error or time-out, for a
# CUDA error that its own watchdog meets first, when it dumps its trace, or when it takes its watchdog for stuck.
KEEP_TORCH_OUT: Final = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
}


class NcclGroup:
    """Collectives are queued on the device; a fault or an abort shows when they are waited for."""

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        device: torch.device,
        deadline: float,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Raises:
            GroupError: the proof failed or did not end by `deadline` (monotonic), or it was cancelled.
            RuntimeError, ValueError: torch's own, of what can't be made.
        """
        self.rank, self.size, self._device = rank, size, device
        self._aborted = threading.Event()
        self._aborting = threading.Lock()
        os.environ.update(KEEP_TORCH_OUT)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = WITHOUT_LIMIT  # of a collective; the store has its own
        options.global_ranks_in_group = list(range(size))
        self._group: Any = dist.ProcessGroupNCCL(store, rank, size, options)
        try:
            self._group.eager_connect_single_device(device)
            self._prove(deadline, cancelled)
        except BaseException:
            self.abort()  # what is left half made would hold memory, and its peers
            raise

    def all_reduce(self, tensor: Tensor, place: str = "") -> Tensor:
        options = dist.AllreduceOptions()
        options.asyncOp = False
        self._run(lambda: self._group.allreduce([tensor], options))
        return tensor

    def gather(self, tensor: Tensor, place: str = "") -> list[Tensor] | None:
        parts = [torch.empty_like(tensor) for _ in range(self.size)] if self.rank == 0 else None
        options = dist.GatherOptions()
        options.rootRank = 0
        options.asyncOp = False
        self._run(lambda: self._group.gather([parts] if parts else [], [tensor], options))
        return parts

    def check(self) -> None:
        if self._aborted.is_set():
            raise GroupAborted("the communicator was aborted")

    def abort(self) -> None:
        """Returns when it is done, whoever began it. There is one communicator, so nothing else has to be aborted."""
        with self._aborting:
            if not self._aborted.is_set():
                self._aborted.set()
                with contextlib.suppress(RuntimeError):  # of a lost device context: the process is about to be replaced
                    self._group.abort()

    def close(self) -> None:
        """Never torch's `shutdown`, which waits for collectives that may wait for ever."""
        self.abort()

    def _run(self, collective: Callable[[], Any]) -> None:
        self.check()
        try:
            work = collective()
            if work is not None:
                work.wait()  # queues; it does not block
        except RuntimeError:
            self.check()  # aborted since
            raise

    def _prove(self, deadline: float, cancelled: Callable[[], bool]) -> None:
        """A peer that is lost meanwhile never answers, so nothing here may block."""
        ones = self.all_reduce(torch.ones(1, device=self._device))
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        while not done.query():  # type: ignore[no-untyped-call]
            if cancelled():
                raise GroupAborted("the meeting was called off")
            if time.monotonic() > deadline:
                raise GroupError("the first all-reduce did not end in time")
            time.sleep(PROOF_PAUSE_SECONDS)
        check_proof(ones.item(), self.size)
