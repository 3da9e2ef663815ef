"""One GPU per rank: NCCL.

torch's process group is used as an object of our own, never as the default group: an abort concerns this object and no
global state, so that it may come from another thread while the next epoch's group is about to be made.

Leaving is separate from freeing. NCCL's abort does both: it sets a flag in the host's memory, which every kernel and
thread of NCCL polls, then waits for them and for its peers, and frees. So `release` starts it
in a thread of its own, and `close` waits for that thread: the compute thread is out long before.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from lockstep_runtime.distributed.errors import (
    CommunicatorAborted,
    CommunicatorError,
    CommunicatorStuckError,
    check_proof,
)
from lockstep_runtime.host.torch_environment import missing_nccl_variables

logger = logging.getLogger(__name__)

WITHOUT_LIMIT: Final = datetime.timedelta(days=30)
LOOK_SECONDS: Final = 0.001  # between two looks at whether the proof is done
PROOF_SECONDS: Final = 10.0  # for the first all-reduce, which connects the ranks
LEAVE_SECONDS: Final = 2.0  # for NCCL's initialisation to end by itself, once it is not wanted any more
FREE_SECONDS: Final = 10.0  # for an abort to free what the communicator holds
QUEUE_SECONDS: Final = 0.1  # an abort waits so long for a collective that is just being queued


class NcclCommunicator:
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
            CommunicatorError: the proof failed or did not end in PROOF_SECONDS, or it was cancelled.
            CommunicatorStuckError: NCCL's initialisation did not end by `deadline` (monotonic), or goes on although it
                was cancelled: it has no time-out, and nothing can end it but the process.
            RuntimeError, ValueError: torch's own, of what can't be made.
        """
        if missing := missing_nccl_variables(os.environ):
            raise CommunicatorError(f"NCCL would end this process at a fault: set {' '.join(missing)} before it starts")
        self.rank, self.size, self._device, self._store = rank, size, device, store
        self._released = threading.Event()
        self._releasing = threading.Lock()
        self._queueing = threading.Lock()
        self._freeing: threading.Thread | None = None
        self._sum, self._gather = dist.AllreduceOptions(), dist.GatherOptions()
        self._sum.asyncOp = self._gather.asyncOp = False
        self._gather.rootRank = 0
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = WITHOUT_LIMIT  # of a collective; the store has its own
        options.global_ranks_in_group = list(range(size))
        self._group: Any = dist.ProcessGroupNCCL(store, rank, size, options)
        try:
            self._connect(deadline, cancelled)
            self._prove(time.monotonic() + PROOF_SECONDS, cancelled)
        except CommunicatorStuckError:
            raise
        except BaseException:
            self.close()  # what is left half made would hold memory, and its peers
            raise

    def all_reduce(self, tensor: Tensor, place: str = "") -> Tensor:
        self._run(lambda: self._group.allreduce([tensor], self._sum))
        return tensor

    def gather(self, tensor: Tensor, place: str = "") -> list[Tensor] | None:
        parts = [torch.empty_like(tensor) for _ in range(self.size)] if self.rank == 0 else None
        self._run(lambda: self._group.gather([parts] if parts else [], [tensor], self._gather))
        return parts

    def check(self) -> None:
        if self._released.is_set():
            raise CommunicatorAborted("the communicator was aborted")

    def release(self) -> None:
        """Returns at once. There is one communicator, so nothing else has to be aborted."""
        with self._releasing:
            if self._released.is_set():
                return
            self._released.set()
            self._freeing = threading.Thread(target=self._abort, args=(self._group,), name="abort", daemon=True)
            self._freeing.start()

    def close(self) -> None:
        """Never torch's `shutdown`, which waits for collectives that may wait for ever.

        Raises:
            CommunicatorStuckError: NCCL does not let go of the communicator.
        """
        self.release()
        if self._freeing is not None:
            self._freeing.join(FREE_SECONDS)
            if self._freeing.is_alive():
                raise CommunicatorStuckError(f"NCCL has not freed an aborted communicator within {FREE_SECONDS:g} s")
            self._freeing = None
        self._group = None  # its last reference: torch's destructor has nothing left to wait for

    @property
    def is_queueing(self) -> bool:
        """Whether a collective is being given to the device just now."""
        return self._queueing.locked()

    def _abort(self, group: Any) -> None:
        """In its own thread. A collective that is just being queued reads what an abort frees; one that waits for room
        on the device is not waited for, since only the abort makes room."""
        queued = self._queueing.acquire(timeout=QUEUE_SECONDS)
        try:
            with contextlib.suppress(RuntimeError):  # of a lost device context: the process is about to be replaced
                group.abort()
        finally:
            if queued:
                self._queueing.release()

    def _run(self, collective: Callable[[], Any]) -> None:
        try:
            with self._queueing:
                self.check()
                work = collective()
            if work is not None:
                work.wait()  # queues; it does not block
        except dist.DistError as error:
            self.check()  # aborted since
            raise CommunicatorError(str(error)) from error
        except RuntimeError:
            self.check()
            raise

    def _connect(self, deadline: float, cancelled: Callable[[], bool]) -> None:
        """NCCL's initialisation, in a thread that can be left behind."""
        failed: list[Exception] = []

        def connect() -> None:
            try:
                self._group.eager_connect_single_device(self._device)
            except Exception as error:
                failed.append(error)

        thread = threading.Thread(target=connect, name="nccl-init", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.01)
            if cancelled():
                thread.join(LEAVE_SECONDS)
                break
            if time.monotonic() > deadline:
                break
        if thread.is_alive():
            raise CommunicatorStuckError("NCCL's initialisation did not end, and can't be left")
        if failed:
            raise failed[0]

    def _prove(self, deadline: float, cancelled: Callable[[], bool]) -> None:
        """A peer that is lost meanwhile never answers, so nothing here may block."""
        ones = self.all_reduce(torch.ones(1, device=self._device))
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        while not done.query():  # type: ignore[no-untyped-call]
            if cancelled():
                raise CommunicatorAborted("the meeting was called off")
            if time.monotonic() > deadline:
                raise CommunicatorError("the first all-reduce did not end in time")
            time.sleep(LOOK_SECONDS)
        check_proof(ones.item(), self.size)
