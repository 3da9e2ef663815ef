"""The worker's two threads against a real bus: what it answers, and how it leaves a collective."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from tests.support.ports import free_port

from lockstep_runtime.config import ServeConfig
from lockstep_runtime.distributed.errors import CommunicatorAborted, CommunicatorError, CommunicatorStuckError
from lockstep_runtime.distributed.traced import TracedCommunicator
from lockstep_runtime.host.addresses import listen
from lockstep_runtime.layers.cache import CacheSize
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.progress_record import Progress, Stage, new_memory
from lockstep_runtime.protocol.status import Fault
from lockstep_runtime.protocol.step import SequenceSlice
from lockstep_runtime.recovery.bus_server import BusServer, FromPeer, Peer
from lockstep_runtime.worker.bus_client import BusClient, ShutdownRequested
from lockstep_runtime.worker.fault_classifier import classify
from lockstep_runtime.worker.images import RankImages
from lockstep_runtime.worker.likeliest import NonFiniteError
from lockstep_runtime.worker.main import Worker
from lockstep_runtime.worker.model_runner import LoadReport, StepOutput
from lockstep_runtime.worker.ruled_draws import Drawn

TOKEN = "a token"
SECONDS = 10.0


@dataclass
class Script:
    """The engine's side of the bus: notes what it hears."""

    peers: list[Peer] = field(default_factory=list)
    heard: list[FromPeer] = field(default_factory=list)
    epoch: int = 1
    answer: bus.Refused | None = None

    def admit(self, hello: bus.Hello) -> bus.Welcome | bus.Refused:
        return self.answer or bus.Welcome(epoch=self.epoch)

    def connected(self, peer: Peer) -> None:
        self.peers.append(peer)

    def received(self, peer: Peer, message: FromPeer) -> None:
        self.heard.append(message)

    def lost(self, peer: Peer) -> None: ...

    async def hear(self, kind: type[Any], count: int = 1) -> Any:
        """The count-th message of a kind."""
        async with asyncio.timeout(SECONDS):
            while len(found := [one for one in self.heard if isinstance(one, kind)]) < count:  # noqa: ASYNC110 - see meet
                await asyncio.sleep(0.005)
        return found[count - 1]

    async def meet(self, count: int) -> Peer:
        async with asyncio.timeout(SECONDS):
            while len(self.peers) < count:  # noqa: ASYNC110 - the bus calls back on its own terms
                await asyncio.sleep(0.005)
        return self.peers[count - 1]


class FakeGroup:
    """A communicator whose collective blocks until it is aborted."""

    rank, size = 0, 2

    def __init__(self) -> None:
        self.aborted = threading.Event()
        self.let_close_end = threading.Event()
        self.let_close_end.set()
        self.stuck = False
        self.closed = False

    def release(self) -> None:
        self.aborted.set()

    def close(self) -> None:
        if self.stuck:
            raise CommunicatorStuckError("NCCL has not freed it")
        assert self.let_close_end.wait(SECONDS)
        self.closed = True

    def all_reduce(self, tensor: Any, place: str = "") -> Any:
        assert self.aborted.wait(SECONDS)
        raise CommunicatorAborted("aborted")

    gather = all_reduce

    def check(self) -> None: ...


@dataclass
class FakeRendezvous:
    address: str = "shm:///somewhere"
    keeps: bool = False

    def close(self) -> None: ...


@dataclass
class FakeEdge:
    """Stands in for torch: `step` is what the next steps do."""

    groups: list[FakeGroup] = field(default_factory=list)
    step_work: Callable[[TracedCommunicator], Any] = lambda group: 42
    images: RankImages = field(default_factory=lambda: RankImages(None))

    def open_rendezvous(self, config: ServeConfig, epoch: int) -> Any:
        return FakeRendezvous()

    def join(
        self, config: ServeConfig, rank: int, epoch: int, address: str, timeout: float, cancelled: Callable[[], bool]
    ) -> Any:
        self.groups.append(FakeGroup())
        return self.groups[-1]

    def load(self, progress: Callable[[int, int], None]) -> LoadReport:
        progress(0, 10)
        progress(10, 10)
        return LoadReport(weight_bytes=10, read_bytes=10, cache=CacheSize(blocks=5), block_size=16, memory_bytes=99)

    def allocate(self, size: CacheSize, *, anew: bool = False) -> Any:
        return SimpleNamespace(name="anew" if anew else "fresh", size=size, nbytes=size.blocks * 100)

    def flip_bit(self, number: int) -> str:
        raise AssertionError(f"nobody asked for bit {number}")

    def give_back_unused(self) -> None: ...

    def is_spoiled(self, unverified: list[SequenceSlice]) -> bool:
        return [one.tokens for one in unverified] == [[13]]

    def step(self, step: bus.Step, group: Any) -> StepOutput:
        return StepOutput(fingerprint=self.step_work(group), drawn=Drawn(), scored=[])


@dataclass
class Scene:
    script: Script
    edge: FakeEdge
    progress: Progress
    control: BusClient
    thread: threading.Thread
    ended_by: list[CommunicatorStuckError]

    async def joined(self, epoch: int) -> Peer:
        peer = self.script.peers[-1]
        before = sum(isinstance(one, bus.Joined) for one in self.script.heard)
        peer.send(bus.Rendezvous(epoch=epoch))
        await self.script.hear(bus.RendezvousOpened)
        peer.send(bus.Join(epoch=epoch, address="shm:///somewhere"))
        await self.script.hear(bus.Joined, before + 1)
        return peer


@pytest.fixture
async def scene() -> Any:
    config = ServeConfig(model="toy", served_name="toy", tensor_parallel_size=2, ranks_per_pod=2, bus_port=free_port())
    script, edge = Script(), FakeEdge()
    server = BusServer(TOKEN, script)
    await server.open(listen("127.0.0.1", config.bus_port))
    progress = Progress(new_memory("test"))
    control = BusClient(config, 0, TOKEN, "incarnation")
    worker = Worker(config, 0, control, progress, edge)

    ended_by: list[CommunicatorStuckError] = []

    def live() -> None:
        worker.load(edge)  # type: ignore[arg-type] # the edge plays the runner too
        try:
            worker.run()
        except CommunicatorStuckError as error:
            ended_by.append(error)

    control.start()
    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    await script.meet(1)
    await script.hear(bus.Loaded)
    yield Scene(script, edge, progress, control, thread, ended_by)
    control.inbox.put(ShutdownRequested("the test is over"))
    await asyncio.to_thread(thread.join, SECONDS)
    control.stop()
    await server.close()


async def until_true(look: Callable[[], bool]) -> None:
    async with asyncio.timeout(SECONDS):
        while not look():  # noqa: ASYNC110 - another thread's doing
            await asyncio.sleep(0.005)


def step(epoch: int, number: int) -> bus.Step:
    return bus.Step(epoch=epoch, step=number, sequences=[])


async def test_it_tells_who_it_is_and_what_it_loaded(scene: Scene) -> None:
    hello = scene.script.peers[0].hello
    assert (hello.role, hello.rank, hello.incarnation, hello.pid) == (bus.Role.WORKER, 0, "incarnation", os.getpid())
    loaded = await scene.script.hear(bus.Loaded)
    assert (loaded.weight_bytes, loaded.cache_blocks, loaded.block_size, loaded.memory_bytes) == (10, 5, 16, 99)
    assert scene.progress.read().stage is Stage.LOADED


async def test_the_dance_and_a_step(scene: Scene) -> None:
    peer = await scene.joined(1)
    peer.send(bus.AllocateCache(epoch=1, blocks=3))
    laid_out = await scene.script.hear(bus.CacheAllocated)
    assert (laid_out.cache_id, laid_out.memory_bytes) == ("fresh", 300)
    peer.send(step(1, 7))
    done = await scene.script.hear(bus.StepDone)
    assert (done.epoch, done.step, done.fingerprint) == (1, 7, 42)
    record = scene.progress.read()
    assert (record.epoch, record.step, record.in_step) == (1, 7, False)


@pytest.mark.parametrize("corrupt", [False, True])
async def test_a_cache_that_is_found_spoiled_is_laid_out_anew(scene: Scene, *, corrupt: bool) -> None:
    peer = await scene.joined(1)
    unverified = SequenceSlice(sequence_id=1, position=4, tokens=[13 if corrupt else 14], blocks=[0])
    peer.send(bus.AllocateCache(epoch=1, blocks=3, unverified=[unverified]))
    laid_out = await scene.script.hear(bus.CacheAllocated)
    assert (laid_out.cache_id, laid_out.corrupt) == (("anew", True) if corrupt else ("fresh", False))


async def test_an_abort_ends_a_blocked_collective_and_is_answered_once(scene: Scene) -> None:
    scene.edge.step_work = lambda group: group.all_reduce(None, "layers.3.mlp.down_proj")  # type: ignore[arg-type]
    peer = await scene.joined(1)
    peer.send(step(1, 1))
    async with asyncio.timeout(SECONDS):
        while not scene.progress.read().in_step:  # noqa: ASYNC110 - shared memory has no event
            await asyncio.sleep(0.005)
    async with asyncio.timeout(SECONDS):
        while not scene.progress.read().inside:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.005)
    record = scene.progress.read()
    assert (record.epoch, record.step, record.collective, record.place) == (1, 1, 1, "layers.3.mlp.down_proj")
    peer.send(bus.Abort(epoch=2))
    assert (await scene.script.hear(bus.Aborted)).epoch == 2
    assert not [one for one in scene.script.heard if isinstance(one, bus.StepFailed)]
    await until_true(lambda: scene.edge.groups[0].closed)
    scene.edge.step_work = lambda group: 5
    peer = await scene.joined(2)
    peer.send(step(1, 2))  # of the past
    peer.send(step(2, 3))
    assert (await scene.script.hear(bus.StepDone)).step == 3


async def test_aborted_is_said_before_anything_is_given_back(scene: Scene) -> None:
    """A communicator may be given back only when its peers have left it, too: they are not to wait for that."""
    peer = await scene.joined(1)
    group = scene.edge.groups[0]
    group.let_close_end.clear()
    peer.send(bus.Abort(epoch=2))
    assert (await scene.script.hear(bus.Aborted)).epoch == 2
    assert group.aborted.is_set()
    assert not group.closed
    group.let_close_end.set()
    await until_true(lambda: group.closed)


async def test_what_a_communicator_had_mapped_is_given_back_when_nobody_waits_for_it(scene: Scene) -> None:
    """Not before the next one is joined: the group waits for that. One at most is kept, however many there were."""
    for epoch in (1, 2, 3):
        peer = await scene.joined(epoch)
    kept = [weakref.ref(group) for group in scene.edge.groups]
    scene.edge.groups.clear()
    await until_true(lambda: [one() is not None for one in kept] == [False, False, True])
    peer.send(bus.Abort(epoch=4))
    await scene.script.hear(bus.Aborted)
    assert kept[-1]() is not None
    await until_true(lambda: kept[-1]() is None)


async def test_a_communicator_that_is_stuck_ends_the_process(scene: Scene) -> None:
    peer = await scene.joined(1)
    scene.edge.groups[0].stuck = True
    peer.send(bus.Abort(epoch=2))
    await scene.script.hear(bus.Aborted)
    await asyncio.to_thread(scene.thread.join, SECONDS)
    assert [str(error) for error in scene.ended_by] == ["NCCL has not freed it"]


@pytest.mark.parametrize(
    ("error", "fault", "message"),
    [
        (ValueError("no such block"), Fault.STEP_FAILED, "ValueError: no such block"),
        (MemoryError("4 GB"), Fault.STEP_FAILED, "out of memory: MemoryError: 4 GB"),
        (MemoryError(), Fault.STEP_FAILED, "out of memory"),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
            Fault.STEP_FAILED,
            "out of memory: RuntimeError: CUDA out of memory. Tried to allocate 2 GiB",
        ),
        (
            RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with"),
            Fault.CONTEXT_FAULT,
            "the device context is lost: RuntimeError: CUDA error: an illegal memory access was encountered",
        ),
        (
            RuntimeError("CUDA error: device-side assert triggered"),
            Fault.CONTEXT_FAULT,
            "the device context is lost: RuntimeError: CUDA error: device-side assert triggered",
        ),
        (
            NonFiniteError("the logits of 1 of 2 sequences hold NaN"),
            Fault.NON_FINITE,
            "the logits of 1 of 2 sequences hold NaN",
        ),
        (CommunicatorError("peer closed"), Fault.RANK_LOST, "the collective broke: peer closed"),
    ],
)
async def test_a_step_that_raises_is_reported_and_the_process_goes_on(
    scene: Scene, error: Exception, fault: Fault, message: str
) -> None:
    def fail(group: TracedCommunicator) -> int:
        raise error

    scene.edge.step_work = fail
    peer = await scene.joined(1)
    peer.send(step(1, 1))
    failed = await scene.script.hear(bus.StepFailed)
    assert (failed.epoch, failed.step, failed.fault, failed.message) == (1, 1, fault, message)
    assert failed.untouched
    assert classify(error) == (fault, message)
    scene.edge.step_work = lambda group: 5
    peer.send(bus.Abort(epoch=2))
    peer = await scene.joined(2)
    peer.send(step(2, 2))
    assert (await scene.script.hear(bus.StepDone)).step == 2


async def test_a_step_before_joining_is_a_failure_and_no_crash(scene: Scene) -> None:
    scene.script.peers[0].send(step(1, 1))
    assert "before the communicator was joined" in (await scene.script.hear(bus.StepFailed)).message


async def test_a_lost_connection_keeps_the_weights_and_drops_the_communicator(scene: Scene) -> None:
    scene.edge.step_work = lambda group: group.all_reduce(None, "layers.3.mlp.down_proj")  # type: ignore[arg-type]
    peer = await scene.joined(1)
    peer.send(step(1, 1))
    scene.script.epoch = 6
    peer.close()
    again = await scene.script.meet(2)
    assert (again.hello.incarnation, again.hello.epoch) == ("incarnation", 1)
    await scene.script.hear(bus.Loaded, 2)
    assert scene.edge.groups[0].closed
    scene.edge.step_work = lambda group: 5
    await scene.joined(6)
    again.send(step(6, 9))
    assert (await scene.script.hear(bus.StepDone)).step == 9


async def test_nonsense_from_the_engine_costs_the_connection_only(scene: Scene) -> None:
    scene.script.peers[0].send_frame(b"\x00\x00\x00\x02\xff\xff")
    await scene.script.meet(2)
    await scene.script.hear(bus.Loaded, 2)
    assert scene.thread.is_alive()


async def test_a_worker_that_was_replaced_ends(scene: Scene) -> None:
    scene.script.answer = bus.Refused(reason="another process has taken the place")
    scene.script.peers[0].close()
    await asyncio.to_thread(scene.thread.join, SECONDS)
    assert not scene.thread.is_alive()


async def test_a_step_that_raises_after_a_collective_has_touched_the_others(scene: Scene) -> None:
    def fail(group: TracedCommunicator) -> int:
        scene.edge.groups[-1].aborted.set()
        return int(group.all_reduce(None))  # type: ignore[arg-type]

    scene.edge.step_work = fail
    peer = await scene.joined(1)
    peer.send(step(1, 1))
    assert not (await scene.script.hear(bus.StepFailed)).untouched


def test_while_it_looks_for_the_engine_the_process_may_not_be_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    looking, seen, found = threading.Event(), threading.Event(), threading.Event()

    def look(*_: Any, **__: Any) -> Any:
        looking.set()
        assert seen.wait(SECONDS)
        found.set()
        raise OSError("nobody is there")

    monkeypatch.setattr(socket, "create_connection", look)
    control = BusClient(ServeConfig(model="toy", served_name="toy", bus_port=1), 0, TOKEN, "incarnation")
    control.start()
    assert looking.wait(SECONDS)
    assert control.resolving.locked()
    seen.set()
    with control.resolving:
        assert found.is_set()
    control.stop()
