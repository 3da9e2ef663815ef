"""The worker between two commands: its scrub takes turns and tells what it finds; a fault on purpose wakes it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from typing import Any

import pytest

from lockstep_runtime.chaos.injector import InjectedError
from lockstep_runtime.config import ServeConfig
from lockstep_runtime.distributed.join import SingleCommunicator
from lockstep_runtime.layers.cache import CacheSize
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.chaos import FaultPhase, Inject, Injection
from lockstep_runtime.protocol.progress_record import Progress, new_memory
from lockstep_runtime.protocol.status import Fault
from lockstep_runtime.worker.bus_client import BusClient, ShutdownRequested
from lockstep_runtime.worker.images import RankImages
from lockstep_runtime.worker.main import Worker
from lockstep_runtime.worker.model_runner import LoadReport
from lockstep_runtime.worker.process import choose_hooks
from lockstep_runtime.worker.scrub import CorruptionError, Parts, Scrub, Watched

SECONDS = 10.0


class RecordingControl(BusClient):
    """No connection: what is sent is kept, and the worker is dismissed after the last."""

    def __init__(self, config: ServeConfig, last: type) -> None:
        super().__init__(config, 0, "token", "incarnation")
        self.sent: list[bus.FromWorker] = []
        self._last = last

    def send(self, message: bus.FromWorker) -> None:
        self.sent.append(message)
        if isinstance(message, self._last):
            self.inbox.put(ShutdownRequested("the test is over"))


class Edge:
    """The runner and the communicators."""

    def __init__(self, scrub: Scrub | None = None) -> None:
        self._scrub, self.images = scrub, RankImages(None)

    def load(self, progress: Callable[[int, int], None]) -> LoadReport:
        return LoadReport(
            weight_bytes=1, read_bytes=1, cache=CacheSize(blocks=1), block_size=1, memory_bytes=1, scrub=self._scrub
        )

    def join(self, *_: Any) -> SingleCommunicator:
        return SingleCommunicator()

    def open_rendezvous(self, *_: Any) -> Any:
        raise NotImplementedError

    def flip_bit(self, number: int) -> str:
        raise InjectedError(f"bit {number}")


def started(control: BusClient, edge: Edge, *, allow_faults: bool = False) -> Worker:
    config, progress = ServeConfig(model="m", served_name="m", allow_faults=allow_faults), Progress(new_memory("test"))
    worker = Worker(config, 0, control, progress, edge, choose_hooks(config, 0, control, progress))
    worker.load(edge)  # type: ignore[arg-type] # the edge plays the runner too
    return worker


def parts(end: str) -> Generator[None, None, str]:
    yield
    return end


def test_a_changed_tensor_is_told_once_in_the_words_of_the_scrub() -> None:
    watched = [Watched("good", lambda: parts("a"), "a"), Watched("mlp.up_proj", lambda: parts("b"), "a")]
    control = RecordingControl(ServeConfig(model="m", served_name="m"), bus.StepFailed)
    worker = started(control, Edge(Scrub(watched, 0.002, time.monotonic())))
    control.inbox.put(bus.Join(epoch=7, address="nowhere"))
    assert worker.run() == "the test is over"
    assert isinstance(control.sent[0], bus.Joined)
    (told,) = control.sent[1:]
    assert isinstance(told, bus.StepFailed)
    assert (told.epoch, told.step, told.fault) == (7, -1, Fault.CORRUPTION)
    assert told.message == "the weights of mlp.up_proj are no longer what was loaded"


def test_without_a_group_nothing_is_looked_at() -> None:
    """Nobody would hear of it, and the time is needed for the repair."""
    looked = threading.Event()

    def look() -> Generator[None, None, str]:
        looked.set()
        return parts("a")

    control = RecordingControl(ServeConfig(model="m", served_name="m"), bus.Aborted)
    worker = started(control, Edge(Scrub([Watched("any", look, "a")], 0.001, time.monotonic() - 10)))
    control.inbox.put(bus.Abort(epoch=1))
    assert worker.run() == "the test is over"
    assert not looked.is_set()


def test_a_fault_on_purpose_befalls_an_idle_worker() -> None:
    config = ServeConfig(model="m", served_name="m", allow_faults=True)
    control = RecordingControl(config, bus.Joined)
    worker = started(control, Edge(), allow_faults=True)
    fault = Inject(rank=0, kind=Injection.FLIP_BIT, phase=FaultPhase.IDLE, number=3)
    assert control.on_inject is not None
    control.on_inject(fault)
    control.inbox.put(fault)
    with pytest.raises(InjectedError, match="bit 3"):
        worker.run()


def test_without_permission_no_fault_is_taken() -> None:
    control = RecordingControl(ServeConfig(model="m", served_name="m"), bus.Joined)
    started(control, Edge())
    assert control.on_inject is None


def test_a_whole_round_looks_at_every_tensor_at_once() -> None:
    def parts(value: str) -> Callable[[], Parts]:
        def one() -> Parts:
            yield
            return value

        return one

    assert Scrub([Watched("a", parts("1"), "1"), Watched("b", parts("2"), "2")], 300.0, 0.0).whole_round() == 2
    with pytest.raises(CorruptionError, match="the weights of b are no longer what was loaded"):
        Scrub([Watched("a", parts("1"), "1"), Watched("b", parts("2"), "3")], 300.0, 0.0).whole_round()
