"""Faults on purpose, in the worker of a rank: its hooks where `--allow-faults` was given, and nowhere else."""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

import msgspec

from lockstep_runtime.chaos import pending
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.chaos import CollectivePoint, FaultPhase, Inject, Injection
from lockstep_runtime.protocol.progress_record import Progress

if TYPE_CHECKING:  # the control thread connects before torch is imported
    from torch import Tensor

    from lockstep_runtime.distributed.communicator import Communicator

logger = logging.getLogger(__name__)

BALLAST_BYTES: Final = 64 * 1024 * 1024  # what the lowered limit leaves
WITHOUT_STEP: Final = frozenset(
    {Injection.SIGKILL, Injection.SIGSTOP, Injection.SIGSEGV, Injection.EXIT, Injection.CLOSE_BUS}
)
ON_STEP: Final = frozenset({Injection.INPUT, Injection.SLOW})  # the others wait for a collective
ON_TENSOR: Final = frozenset({Injection.NAN, Injection.ACTIVATION})


class InjectedError(RuntimeError):
    """Raised on purpose."""


class Injector:
    """`close_bus` cuts the connection to the engine."""

    def __init__(self, rank: int, progress: Progress, close_bus: Callable[[], None]) -> None:
        self._rank, self._progress, self._close_bus = rank, progress, close_bus
        self._flip_bit: Callable[[int], str]
        self._armed: list[Inject] = []
        self._lock = threading.Lock()

    def begin_load(self, flip_bit: Callable[[int], str]) -> None:
        """Take the faults that wait for this process. `flip_bit` changes a bit of the weights and names the tensor."""
        self._flip_bit = flip_bit
        for fault in pending.take(os.environ, self._rank):
            self.arm(fault)

    def arm(self, fault: Inject) -> None:
        """From any thread; what needs no step and is wanted now happens now."""
        logger.warning("inject: %s, %s", fault.kind, fault.phase)
        if fault.phase is FaultPhase.NOW and fault.kind in WITHOUT_STEP:
            self._act(fault)
            return
        with self._lock:
            self._armed.append(fault)

    def idle(self) -> None:
        """Between two commands."""
        self._act_on(FaultPhase.IDLE)

    def loading(self) -> None:
        """While weights are being read."""
        self._act_on(FaultPhase.LOADING)

    def joining(self) -> None:
        """Before a communicator is joined."""
        self._act_on(FaultPhase.JOINING)

    def step(self, step: bus.Step, group: Communicator) -> tuple[bus.Step, Communicator]:
        """The step and the group as they are, or as the faults that are due make them."""
        prefill = any(len(one.tokens) > 1 for one in step.sequences)
        due = self._due(FaultPhase.PREFILL if prefill else FaultPhase.DECODE)
        for fault in due:
            if fault.kind is Injection.SLOW:
                time.sleep(fault.seconds)
                if fault.times > 1:
                    self._rearm(msgspec.structs.replace(fault, times=fault.times - 1))
            elif fault.kind is Injection.INPUT:
                step = _altered(step)
        at_collectives = [fault for fault in due if fault.kind not in ON_STEP]
        return step, FaultyGroup(group, self._progress, at_collectives, self._act) if at_collectives else group

    def _due(self, phase: FaultPhase) -> list[Inject]:
        """Take what acts in a step of this phase; what is to skip it, skips it."""
        with self._lock:
            concerned = [fault for fault in self._armed if fault.phase in (phase, FaultPhase.NOW)]
            due = [fault for fault in concerned if fault.skip == 0]
            skipping = [msgspec.structs.replace(fault, skip=fault.skip - 1) for fault in concerned if fault.skip]
            self._armed = [fault for fault in self._armed if fault not in concerned] + skipping
        return due

    def _act_on(self, phase: FaultPhase) -> None:
        with self._lock:
            due = [fault for fault in self._armed if fault.phase is phase]
            self._armed = [fault for fault in self._armed if fault not in due]
        for fault in due:
            if fault.kind in ON_STEP | ON_TENSOR:
                self._rearm(msgspec.structs.replace(fault, phase=FaultPhase.NOW))
            else:
                self._act(fault)

    def _rearm(self, fault: Inject) -> None:
        with self._lock:
            self._armed.append(fault)

    def _act(self, fault: Inject) -> None:
        match fault.kind:
            case Injection.RAISE:
                raise InjectedError("raised on purpose")
            case Injection.HANG:
                hang()
            case Injection.SIGKILL | Injection.SIGSTOP:
                os.kill(os.getpid(), signal.Signals[fault.kind.upper()])
            case Injection.SIGSEGV:
                ctypes.string_at(0)
            case Injection.EXIT:
                os._exit(1)
            case Injection.MEMORY:
                exhaust_memory()
            case Injection.FLIP_BIT:
                logger.warning("inject: flipped a bit of %s", self._flip_bit(fault.number))
            case Injection.CLOSE_BUS:
                self._close_bus()
            case Injection.DEVICE_ASSERT | Injection.ILLEGAL_ACCESS:
                harm_device(fault.kind)
            case _:
                raise ValueError(f"{fault.kind} needs a step")


class FaultyGroup:
    """A communicator in which something goes wrong, once, at a place."""

    def __init__(
        self, group: Communicator, progress: Progress, faults: list[Inject], act: Callable[[Inject], None]
    ) -> None:
        self.rank, self.size = group.rank, group.size
        self._group, self._progress, self._faults, self._act = group, progress, faults, act

    def all_reduce(self, tensor: Tensor, place: str = "") -> Tensor:
        due = [fault for fault in self._faults if fault.place in place]
        self._faults = [fault for fault in self._faults if fault not in due]
        self._before(due, place)
        for fault in due:
            if fault.kind is Injection.NAN:
                tensor.view(-1)[0] = float("nan")
        result = self._group.all_reduce(tensor, place)
        for fault in due:
            if fault.kind is Injection.ACTIVATION:
                result.view(-1)[0] += 1.0
            elif fault.at is CollectivePoint.AFTER and fault.kind not in ON_TENSOR:
                self._act(fault)
        return result

    def _before(self, due: list[Inject], place: str) -> None:
        for fault in due:
            if fault.kind in ON_TENSOR or fault.at is CollectivePoint.AFTER:
                continue
            if fault.at is CollectivePoint.INSIDE:
                self._progress.enter_collective(place)
                if fault.kind is Injection.HANG:
                    self._wait_for_abort()
            self._act(fault)

    def _wait_for_abort(self) -> NoReturn:
        """As in a collective that never completes: only an abort ends it."""
        while True:
            self._group.check()
            time.sleep(0.001)

    def gather(self, tensor: Tensor, place: str = "") -> list[Tensor] | None:
        return self._group.gather(tensor, place)

    def check(self) -> None:
        self._group.check()

    def release(self) -> None:
        self._group.release()

    def close(self) -> None:
        self._group.close()


def hang() -> NoReturn:
    """As compute that never ends, and listens to nothing."""
    while True:
        time.sleep(3600)


def exhaust_memory() -> NoReturn:
    """Allocate until the system refuses; what was allocated is freed again on the way out.

    Raises:
        RuntimeError: torch's own, of the allocation that failed.
    """
    import torch

    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + BALLAST_BYTES, limits[1]))
    ballast = []
    try:
        while True:
            ballast.append(torch.empty(BALLAST_BYTES // 8, dtype=torch.uint8))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def harm_device(kind: Injection) -> None:
    """See `device_faults.provoke`, imported late because torch is."""
    from lockstep_runtime.chaos.device_faults import provoke

    provoke(kind)


def _altered(step: bus.Step) -> bus.Step:
    """The last token of the first sequence is another."""
    first, *others = step.sequences
    *tokens, last = first.tokens
    wrong = msgspec.structs.replace(first, tokens=[*tokens, last ^ 1])
    return msgspec.structs.replace(step, sequences=[wrong, *others])
