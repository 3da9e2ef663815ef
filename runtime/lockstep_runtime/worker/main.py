"""The worker process: the main thread computes what the control thread takes from the bus, one command at a time."""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import TYPE_CHECKING, Final, Protocol

from lockstep_runtime import wire
from lockstep_runtime.config import ServeConfig
from lockstep_runtime.progress import Progress, Stage
from lockstep_runtime.wire import Fault
from lockstep_runtime.worker.control import Connected, Control, Disconnected, Dismissed

if TYPE_CHECKING:
    from lockstep_runtime.parallel.group import Group, Rendezvous
    from lockstep_runtime.worker.runner import LoadReport, Runner

logger = logging.getLogger(__name__)

JOIN_SECONDS: Final = 10.0  # the engine waits longer than this before it kills a rank that joins
PROGRESS_SECONDS: Final = 0.2  # between two LoadProgress messages
LOAD_FAILED_EXIT: Final = 3
FAREWELL_SECONDS: Final = 5.0  # for the engine to be there to hear why loading failed


class Collectives(Protocol):
    """`parallel.group`, imported late because torch is."""

    def open_rendezvous(self, config: ServeConfig, epoch: int) -> Rendezvous: ...

    def join(self, config: ServeConfig, rank: int, epoch: int, address: str, timeout: float) -> Group: ...


class Worker:
    """One rank: its weights and, within an epoch, its place in the communicator."""

    def __init__(
        self, config: ServeConfig, rank: int, control: Control, progress: Progress, collectives: Collectives
    ) -> None:
        self._config, self._rank = config, rank
        self._control, self._progress, self._collectives = control, progress, collectives
        self._rendezvous: Rendezvous | None = None
        self._group: Group | None = None
        self._loaded: wire.Loaded | None = None
        self._runner: Runner
        self._progress_sent = 0.0
        control.interrupt = self._interrupt

    def load(self, runner: Runner) -> None:
        """Read this rank's weights."""
        self._runner = runner
        self._progress.set_stage(Stage.LOADING)
        begun = time.monotonic()
        report = runner.load(self._on_progress)
        self._loaded = _loaded(report, time.monotonic() - begun)
        self._progress.set_stage(Stage.LOADED)

    def run(self) -> str:
        """Work until dismissed; returns the reason."""
        while True:
            command = self._control.inbox.get()
            match command:
                case Dismissed():
                    return command.reason
                case Connected():
                    self._drop_group()
                    if self._loaded is not None and self._control.is_current(command):
                        self._control.send(self._loaded)
                case Disconnected():
                    self._drop_group()
                case wire.Abort():
                    begun = time.monotonic()
                    self._drop_group()
                    self._control.send(wire.Aborted(epoch=command.epoch, seconds=time.monotonic() - begun))
                case _ if command.epoch >= self._control.fence:
                    self._obey(command)

    def _obey(self, command: wire.Rendezvous | wire.Join | wire.AllocateCache | wire.Step) -> None:
        """Any exception is this rank's failure to report, not a reason to end: the engine decides what follows."""
        step = command.step if isinstance(command, wire.Step) else -1
        try:
            self._control.send(self._answer(command))
        except Exception as error:
            if self._control.fence > command.epoch:
                return  # it was aborted; `Abort` is next in the inbox and is answered
            fault, message = classify(error)
            logger.log(
                logging.WARNING if fault is Fault.RANK_LOST else logging.ERROR,
                "%s of epoch %d failed: %s", type(command).__name__, command.epoch, message,
                exc_info=None if fault is Fault.RANK_LOST else error,
            )  # fmt: skip
            self._control.send(wire.StepFailed(epoch=command.epoch, step=step, fault=fault, message=message))

    def _answer(self, command: wire.Rendezvous | wire.Join | wire.AllocateCache | wire.Step) -> wire.FromWorker:
        match command:
            case wire.Step():
                return self._step(command)
            case wire.Rendezvous():
                self._drop_group()
                self._rendezvous = self._collectives.open_rendezvous(self._config, command.epoch)
                return wire.RendezvousOpened(epoch=command.epoch, address=self._rendezvous.address)
            case wire.Join():
                return self._join(command)
            case wire.AllocateCache():
                memory = self._runner.allocate(command.blocks)
                return wire.CacheAllocated(epoch=command.epoch, blocks=command.blocks, memory_bytes=memory)

    def _join(self, command: wire.Join) -> wire.Joined:
        begun = time.monotonic()
        self._group = self._collectives.join(self._config, self._rank, command.epoch, command.address, JOIN_SECONDS)
        if self._control.fence > command.epoch:  # an abort that came before there was a group to abort
            self._group.abort()
        return wire.Joined(epoch=command.epoch, seconds=time.monotonic() - begun)

    def _step(self, command: wire.Step) -> wire.StepDone:
        if self._group is None:
            raise RuntimeError("a step came before the communicator was joined")
        self._progress.enter(command.epoch, command.step)
        begun = time.monotonic()
        output = self._runner.step(command, self._group)
        seconds = time.monotonic() - begun
        self._progress.leave(command.epoch, command.step)
        return wire.StepDone(
            epoch=command.epoch,
            step=command.step,
            seconds=seconds,
            fingerprint=output.fingerprint,
            sampled=output.sampled,
        )

    def _interrupt(self) -> None:
        """From the control thread."""
        group = self._group
        if group is not None:
            group.abort()

    def _drop_group(self) -> None:
        group, self._group = self._group, None
        rendezvous, self._rendezvous = self._rendezvous, None
        try:
            if group is not None:
                group.abort()
                group.close()
            if rendezvous is not None:
                rendezvous.close()
        except Exception as error:  # what can't be closed is left behind; the next epoch uses nothing of it
            logger.warning("closing the communicator: %s: %s", type(error).__name__, error)

    def _on_progress(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._progress_sent >= PROGRESS_SECONDS or done == total:
            self._progress_sent = now
            self._control.send(wire.LoadProgress(bytes_done=done, bytes_total=total))


def classify(error: Exception) -> tuple[Fault, str]:
    """The fault's name and a message. A broken collective says that a peer is lost: the cause is elsewhere."""
    from lockstep_runtime.parallel.group import GroupError

    if isinstance(error, GroupError):
        return Fault.RANK_LOST, f"the collective broke: {error}"
    return Fault.STEP_FAILED, f"{type(error).__name__}: {error}"


def _loaded(report: LoadReport, seconds: float) -> wire.Loaded:
    return wire.Loaded(
        seconds=seconds,
        weight_bytes=report.weight_bytes,
        read_bytes=report.read_bytes,
        cache_blocks=report.cache_blocks,
        block_size=report.block_size,
        memory_bytes=report.memory_bytes,
    )


def run(config: ServeConfig, rank: int, control: Control, progress: Progress) -> int:
    """The process after its imports of the light kind; returns the exit code."""
    from lockstep_runtime.parallel import group as collectives
    from lockstep_runtime.worker.runner import Runner

    worker = Worker(config, rank, control, progress, collectives)
    try:
        worker.load(Runner(config, rank))
    except Exception as error:
        message = load_error(error)
        logger.error("can't load: %s", message)
        _say_farewell(control, message)
        return LOAD_FAILED_EXIT
    reason = worker.run()
    logger.info("ends: %s", reason)
    return 0


def load_error(error: Exception) -> str:
    """The model's own words where it is the model's fault, else the exception."""
    from lockstep_runtime.weights.errors import ModelError

    return str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {error}"


def _say_farewell(control: Control, message: str) -> None:
    """Tell the engine why, as soon as it can be reached: this process has nothing else to do."""
    deadline = time.monotonic() + FAREWELL_SECONDS
    while time.monotonic() < deadline and not control.connected:
        time.sleep(0.05)
    control.send(wire.LoadFailed(message=message))


def main(rank: int) -> None:
    """See `__main__`; ends the process."""
    import msgspec

    from lockstep_runtime import child
    from lockstep_runtime.config import CONFIG_VARIABLE, TOKEN_VARIABLE

    config = msgspec.json.decode(os.environ[CONFIG_VARIABLE], type=ServeConfig)
    child.become(f"worker {rank}", f"worker model={config.model_name} group={config.group} rank={rank}")
    progress = Progress(int(os.environ[child.PROGRESS_VARIABLE]))
    control = Control(config, rank, os.environ[TOKEN_VARIABLE], os.environ[child.INCARNATION_VARIABLE])
    control.start()  # connected while torch is imported
    code = run(config, rank, control, progress)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)  # no interpreter teardown: torch's threads and the control thread have nothing to finish
