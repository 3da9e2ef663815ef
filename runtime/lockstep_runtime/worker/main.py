"""The worker process: the main thread computes what the control thread takes from the bus, one command at a time."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable
from typing import Final, Protocol

import msgspec

from lockstep_runtime.chaos.injector import Injector
from lockstep_runtime.config import ServeConfig
from lockstep_runtime.distributed.communicator import Communicator
from lockstep_runtime.distributed.errors import CommunicatorStuckError
from lockstep_runtime.distributed.join import Rendezvous, join_seconds
from lockstep_runtime.distributed.traced import TracedCommunicator
from lockstep_runtime.layers.cache import CacheSize
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.chaos import Inject
from lockstep_runtime.protocol.progress_record import Progress, Stage
from lockstep_runtime.protocol.status import Download, Fault
from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.sources.model_folder import await_model
from lockstep_runtime.worker.bus_client import BusClient, Command, Connected, Disconnected, ShutdownRequested
from lockstep_runtime.worker.fault_classifier import classify, is_out_of_memory
from lockstep_runtime.worker.heartbeat import Heartbeat
from lockstep_runtime.worker.hooks import Hooks
from lockstep_runtime.worker.model_runner import LoadReport, ModelRunner
from lockstep_runtime.worker.next_rendezvous import NextRendezvous
from lockstep_runtime.worker.scrub import CorruptionError, Scrub

logger = logging.getLogger(__name__)

Order = bus.Rendezvous | bus.Join | bus.AllocateCache | bus.Step | bus.Scrub

JOIN_STEP: Final = -1  # joining, in the progress record
IDLE_SECONDS: Final = 1.0  # without a command
PROGRESS_SECONDS: Final = 0.2  # between two LoadProgress messages


class Collectives(Protocol):
    """What a worker needs of `distributed.join`."""

    def open_rendezvous(self, config: ServeConfig, epoch: int) -> Rendezvous: ...

    def join(
        self,
        config: ServeConfig,
        rank: int,
        epoch: int,
        address: str,
        timeout: float,
        cancelled: Callable[[], bool],
    ) -> Communicator: ...


class Worker:
    """One rank: its weights and, within an epoch, its place in the communicator."""

    def __init__(
        self,
        config: ServeConfig,
        rank: int,
        control: BusClient,
        progress: Progress,
        collectives: Collectives,
        hooks: Hooks | Injector | None = None,
    ) -> None:
        self._config, self._rank = config, rank
        self._control, self._progress, self._collectives = control, progress, collectives
        self._rendezvous: Rendezvous | None = None
        self._next = NextRendezvous(lambda: collectives.open_rendezvous(config, self._epoch + 1))
        self._group: Communicator | None = None
        self._closed: Communicator | None = None  # the last one: what it had mapped goes with it, when there is time
        self._loaded: bus.Loaded | None = None
        self._epoch = 0  # of the communicator
        self._runner: ModelRunner
        self._scrub: Scrub | None = None
        self._progress_sent = 0.0
        self._load_progress = bus.LoadProgress(bytes_done=0, bytes_total=0)
        self._fetched = 0  # bytes that the fetcher had moved when this process had waited for it
        control.interrupt = self._interrupt
        self._hooks = hooks or Hooks()

    def locate(self) -> ServeConfig:
        """Wait until the pod's fetcher has brought the model; the configuration then names its folder.

        Raises:
            ModelError: it can't be brought, or there is none.
        """

        def tell(download: Download, moved: int) -> None:
            self._fetched = moved
            self._control.send(bus.LoadProgress(bytes_done=0, bytes_total=0, bytes_moved=moved, download=download))

        return msgspec.structs.replace(self._config, model=str(await_model(self._config, tell)))

    def load(self, runner: ModelRunner) -> None:
        """Read this rank's weights."""
        self._runner = runner
        self._progress.set_stage(Stage.LOADING)
        self._hooks.begin_load(runner.flip_bit)
        begun = time.monotonic()
        with Heartbeat(self._beat):
            report = runner.load(self._on_progress)
        self._scrub = report.scrub
        self._loaded = _loaded(report, time.monotonic() - begun)
        self._progress.set_stage(Stage.LOADED)

    def run(self) -> str:
        """Work until dismissed; returns the reason.

        Raises:
            CommunicatorStuckError: this process is in something that only its end can end.
        """
        while True:
            command = self._next_command()
            match command:
                case ShutdownRequested():
                    self._next.close()
                    return command.reason
                case Connected():
                    self._drop_group()
                    if self._loaded is not None and self._control.is_current(command):
                        self._runner.images.forget()  # the engine counts on nothing that it sent by another connection
                        self._control.send(self._loaded)
                case Disconnected():
                    self._drop_group()
                case bus.Abort():
                    self._abort(command)
                case Inject():
                    self._hooks.idle()
                case bus.ImagePart():
                    self._runner.images.take(command)
                case _ if command.epoch >= self._control.min_epoch:
                    self._execute(command)

    def _abort(self, command: bus.Abort) -> None:
        """This thread is out of whatever it was in. To say so waits for nothing: what a communicator holds may take
        seconds to be given back, and as long as its peers have not left theirs."""
        begun = time.monotonic()
        if self._group is not None:
            self._group.release()
        self._control.send(bus.Aborted(epoch=command.epoch, seconds=time.monotonic() - begun))
        self._drop_group()

    def _next_command(self) -> Command:
        """While there is none, and between two, the scrub takes its turns."""
        while True:
            scrub = self._scrub if self._group is not None else None
            try:
                return self._control.inbox.get(timeout=scrub.wait(time.monotonic()) if scrub else self._idle_seconds())
            except queue.Empty:
                self._closed = None
                if scrub is not None:
                    self._scrub_on()

    def _idle_seconds(self) -> float | None:
        return IDLE_SECONDS if self._closed is not None else None

    def _scrub_on(self) -> None:
        try:
            if self._scrub is not None:
                self._scrub.turn(time.monotonic())
        except CorruptionError as error:
            logger.error("%s", error)
            self._scrub = None  # once is enough: this process is to be replaced
            message = bus.StepFailed(epoch=self._epoch, step=-1, fault=Fault.CORRUPTION, message=str(error))
            self._control.send(message)

    def _execute(self, command: Order) -> None:
        """Any exception but that of a stuck communicator is this rank's failure to report, not a reason to end: the
        engine decides what follows."""
        step = command.step if isinstance(command, bus.Step) else -1
        starved = False
        try:
            self._control.send(self._answer(command))
        except CommunicatorStuckError:
            raise
        except Exception as error:
            if self._control.min_epoch > command.epoch:
                return  # it was aborted; `Abort` is next in the inbox and is answered
            fault, message = classify(error)
            starved = is_out_of_memory(error)
            untouched = step >= 0 and not self._progress.collectives
            self._control.send(  # before it is logged: a traceback takes its time
                bus.StepFailed(epoch=command.epoch, step=step, fault=fault, message=message, untouched=untouched)
            )
            logger.log(
                logging.WARNING if fault is Fault.RANK_LOST else logging.ERROR,
                "%s of epoch %d failed: %s", type(command).__name__, command.epoch, message,
                exc_info=None if fault is Fault.RANK_LOST else error,
            )  # fmt: skip
        if starved:  # the error is gone, and with it what its frames referred to
            self._runner.give_back_unused()

    def _answer(self, command: Order) -> bus.FromWorker:
        match command:
            case bus.Step():
                return self._step(command)
            case bus.Rendezvous():
                self._drop_group()
                found = self._next.take()
                self._rendezvous = found or self._collectives.open_rendezvous(self._config, command.epoch)
                return bus.RendezvousOpened(epoch=command.epoch, address=self._rendezvous.address)
            case bus.Join():
                return self._join(command)
            case bus.AllocateCache():
                return self._allocate(command)
            case bus.Scrub():
                return self._scrub_all(command)

    def _scrub_all(self, command: bus.Scrub) -> bus.Scrubbed | bus.StepFailed:
        try:
            tensors = self._scrub.whole_round() if self._scrub is not None else 0
        except CorruptionError as error:
            return bus.StepFailed(epoch=command.epoch, step=-1, fault=Fault.CORRUPTION, message=str(error))
        return bus.Scrubbed(epoch=command.epoch, tensors=tensors)

    def _allocate(self, command: bus.AllocateCache) -> bus.CacheAllocated:
        wanted = CacheSize(blocks=command.blocks, state_slots=command.state_slots)
        offered = self._loaded.cache_blocks if self._loaded is not None else wanted.blocks
        if wanted.blocks > offered:  # what a process before this one had may have been given back since
            offered = self._room()
        if wanted.blocks > offered:
            return bus.CacheAllocated(epoch=command.epoch, cache_id="", blocks=offered, memory_bytes=0)
        cache = self._runner.allocate(wanted)
        corrupt = self._runner.is_spoiled(command.unverified)
        if corrupt:
            logger.warning("NaN or infinity stood in the KV cache, which is laid out anew")
            cache = self._runner.allocate(wanted, anew=True)
        return bus.CacheAllocated(
            epoch=command.epoch, cache_id=cache.name, blocks=wanted.blocks, memory_bytes=cache.nbytes, corrupt=corrupt
        )

    def _room(self) -> int:
        try:
            return self._runner.room().blocks
        except ModelError:
            return 0

    def _join(self, command: bus.Join) -> bus.Joined:
        begun = time.monotonic()
        self._progress.enter(command.epoch, JOIN_STEP)
        self._runner.images.forget_tokens()
        self._hooks.joining()
        self._progress.enter_collective("the meeting place")
        group = self._collectives.join(
            self._config, self._rank, command.epoch, command.address, join_seconds(self._config),
            lambda: self._control.min_epoch > command.epoch,
        )  # fmt: skip
        self._progress.leave(command.epoch, JOIN_STEP)
        self._group, self._epoch = TracedCommunicator(group, self._progress), command.epoch
        if self._rendezvous is not None and self._rendezvous.keeps:
            self._next.prepare()
        if self._control.min_epoch > command.epoch:  # an abort that came before there was a group to abort
            self._group.release()
        return bus.Joined(epoch=command.epoch, seconds=time.monotonic() - begun)

    def _step(self, command: bus.Step) -> bus.StepDone:
        if self._group is None:
            raise RuntimeError("a step came before the communicator was joined")
        self._progress.enter(command.epoch, command.step)
        begun = time.monotonic()
        output = self._runner.step(*self._hooks.step(command, self._group))
        seconds = time.monotonic() - begun
        self._progress.leave(command.epoch, command.step)
        return bus.StepDone(
            epoch=command.epoch,
            step=command.step,
            seconds=seconds,
            fingerprint=output.fingerprint,
            sampled=output.sampled,
            scored=output.scored,
            put_off=output.drawn.put_off,
            failures=output.drawn.failures,
        )

    def _interrupt(self) -> None:
        """From the control thread."""
        group = self._group
        if group is not None:
            group.release()

    def _drop_group(self) -> None:
        group, self._group = self._group, None
        rendezvous, self._rendezvous = self._rendezvous, None
        try:
            if rendezvous is not None:
                rendezvous.close()
            if group is not None:
                self._closed = group
                group.close()
        except CommunicatorStuckError:
            raise
        except Exception as error:  # what can't be closed is left behind; the next epoch uses nothing of it
            logger.warning("closing the communicator: %s: %s", type(error).__name__, error)

    def _on_progress(self, done: int, total: int) -> None:
        self._hooks.loading()
        self._load_progress = bus.LoadProgress(bytes_done=done, bytes_total=total)
        now = time.monotonic()
        if now - self._progress_sent >= PROGRESS_SECONDS or done == total:
            self._progress_sent = now
            self._control.send(self._load_progress)

    def _beat(self, moved: int) -> None:
        """From the heartbeat's thread: a download, or whatever else takes long, gets further."""
        self._control.send(msgspec.structs.replace(self._load_progress, bytes_moved=self._fetched + moved))


def _loaded(report: LoadReport, seconds: float) -> bus.Loaded:
    return bus.Loaded(
        seconds=seconds,
        weight_bytes=report.weight_bytes,
        read_bytes=report.read_bytes,
        cache_blocks=report.cache.blocks,
        state_slots=report.cache.state_slots,
        block_size=report.block_size,
        memory_bytes=report.memory_bytes,
    )
