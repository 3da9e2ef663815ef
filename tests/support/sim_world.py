"""A whole group without sockets and without waiting: the real engine, with ranks that misbehave by lot."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
from tests.support.fake_ranks import BLOCK_SIZE, FakeRank, ToyMemory, continuation

from lockstep_runtime.config import EngineLimits, ServeConfig, Watchdog
from lockstep_runtime.engine.client import EngineBusyError, GenerationFailedError, GenerationRequest
from lockstep_runtime.engine.engine import Engine
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.status import Fault, GroupState, GroupStatus
from lockstep_runtime.protocol.step import SamplingParams
from lockstep_runtime.recovery.actions import Action, ReportFault
from lockstep_runtime.recovery.driver import GroupDriver
from lockstep_runtime.recovery.policy import REBUILDS, RESPAWNS
from lockstep_runtime.supervisor.state_machine import backoff

_decoder: msgspec.msgpack.Decoder[bus.ToWorker] = msgspec.msgpack.Decoder(bus.ToWorker)
FAULTS = (
    "die", "crash", "stop", "hang", "hang outside", "raise", "refuse", "nan", "nan in cache", "context", "odd",
    "corrupt", "cut", "slow", "die in join", "hang in join", "raise in join", "die in loading", "crash loop",
)  # fmt: skip
LOAD_FAILURES = {
    "disk full": bus.LoadFailure.TRANSIENT,
    "bug": bus.LoadFailure.PERMANENT,
    "device lost": bus.LoadFailure.DEVICE_LOST,
}
LASTING = (
    "cut off", "orphaned", "no zygote", "die in loading", "hang in loading", "die in join", "hang in join", "raise",
    "corrupt", *LOAD_FAILURES,
)  # fmt: skip
GARBAGE = (Fault.CORRUPTION, Fault.CONTEXT_FAULT)


@dataclass
class Link:
    """One end of a connection: what is sent arrives a little later, in order, unless it was closed meanwhile."""

    hello: bus.Hello
    world: World
    receive: Callable[[msgspec.Struct], None]
    is_open: bool = True

    def send(self, message: msgspec.Struct) -> None:
        self.world.later(0.0002, self._arrive, message)

    def send_frame(self, frame: bytes) -> None:
        self.send(_decoder.decode(frame[4:]))

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            self.world.later(0.0001, self.world.engine.group.lost, self)

    def answer(self, message: msgspec.Struct) -> None:
        self.world.later(0.0002, self._delivered, message)

    def _arrive(self, message: msgspec.Struct) -> None:
        if self.is_open:
            self.receive(message)

    def _delivered(self, message: msgspec.Struct) -> None:
        if self.is_open:
            self.world.engine.group.received(self, message)  # type: ignore[arg-type] # typed by who sends it


class SimRank:
    """One rank over all its processes, and the supervisor of its pod."""

    def __init__(self, world: World, rank: int) -> None:
        self.world, self.rank = world, rank
        self.processes = 0
        self.link: Link | None = None
        self.plan: list[str] = []  # of faults, for the next chance
        self.crashes = 0  # how many of the next processes die before they are loaded
        self.memory = ToyMemory()
        self.ill: set[str] = set()  # of `LASTING`: until it is mended
        self.failures = 0  # processes in a row that ended before they were loaded
        self.waits = False  # for a zygote
        self.pods = 0
        self._connect_supervisor()
        self.spawn()

    def _connect_supervisor(self) -> None:
        hello = self.world.hello(bus.Role.SUPERVISOR, self.rank, f"s{self.rank}.{self.pods}")
        self.supervisor = Link(hello, self.world, self._execute)
        self.world.engine.group.connected(self.supervisor)

    # --- the process

    def spawn(self) -> None:
        if "no zygote" in self.ill:
            self.waits = True
            return
        self.processes += 1
        self.incarnation = f"{self.rank}.{self.processes}"
        self.toy = FakeRank(
            self.world.config, self.rank, cache_blocks=24, state_slots=self.world.state_slots, memory=self.memory
        )
        self.alive, self.silent, self.corrupt, self.joined = True, False, False, -1
        self.epoch, self.min_epoch = 0, 0
        self.place = (0, False)
        self.toy.moved_at = time.monotonic()
        self.world.later(self.world.chance.uniform(0.01, 0.3), self._connect, self.incarnation)

    def _connect(self, incarnation: str) -> None:
        if not self.alive or incarnation != self.incarnation or "cut off" in self.ill:
            return
        hello = self.world.hello(bus.Role.WORKER, self.rank, incarnation, self.min_epoch)
        welcome = self.world.engine.group.admit(hello)
        assert isinstance(welcome, bus.Welcome), welcome
        self.min_epoch = max(self.min_epoch, welcome.epoch)
        self.link = Link(hello, self.world, self._receive)
        self.world.engine.group.connected(self.link)
        if self.crashes or self._takes("die in loading"):
            self.crashes = max(0, self.crashes - 1)
            self.die()
        elif kind := next((one for one in LOAD_FAILURES if one in self.ill), ""):
            self.say(bus.LoadProgress(bytes_done=5, bytes_total=10), 0.1)
            self.say(bus.LoadFailed(message=kind, kind=LOAD_FAILURES[kind]), 0.2)
            self.world.later(0.21, self.die, self.incarnation)
        elif "hang in loading" in self.ill:
            self.say(bus.LoadProgress(bytes_done=5, bytes_total=10), 0.1)
        else:
            self.say(self.toy.loaded(), self.world.chance.uniform(0.0, 0.2))
            self.failures = 0

    def die(self, incarnation: str = "") -> None:
        """As by SIGKILL; the supervisor sees it and starts another."""
        if not self.alive or (incarnation and incarnation != self.incarnation):
            return
        self.alive = False
        self.failures += 1
        if self.link is not None:
            self.link.close()
            self.link = None
        exited = bus.ProcessExited(rank=self.rank, pid=1, incarnation=self.incarnation, signal=9)
        self.world.later(self.world.chance.uniform(0.0, 0.02), self.supervisor.answer, exited)
        self.world.later(0.05 + backoff(self.failures), self.spawn)

    def crash(self) -> None:
        """As by SIGSEGV: what it has written is not handed on."""
        if self.alive:
            self.memory = ToyMemory()
            self.die()

    def cut(self) -> None:
        """The connection is lost; the process makes another."""
        if self.alive and self.link is not None:
            self.link.close()
            self.link, self.joined = None, -1
            self.world.later(0.05, self._connect, self.incarnation)

    def fall_ill(self, kind: str) -> None:
        """For good, until it is mended."""
        self.ill.add(kind)
        match kind:
            case "cut off":
                for link in (self.link, self.supervisor):
                    if link is not None:
                        link.close()
                self.link, self.joined = None, -1
            case "orphaned":  # its supervisor is out of reach, and its main thread hangs
                self.supervisor.close()
                self.joined = -2
            case "corrupt":
                self.corrupt = True
            case "die in join" | "hang in join" | "raise":
                pass
            case _:
                self.die()

    def mend(self) -> None:
        """The cause is gone; whatever waited goes on."""
        was, self.ill, self.corrupt = self.ill, set(), False
        if self.waits:
            self.waits = False
            self.spawn()
        if was & {"cut off", "orphaned"}:
            self._connect_supervisor()
        if "cut off" in was:
            self._connect(self.incarnation)

    def new_pod(self) -> None:
        """As the operator has it: another pod in its place, whose node may have the same illness."""
        self.pods += 1
        self.die()
        self.supervisor.close()
        if not self.ill & {"cut off", "orphaned"}:
            self._connect_supervisor()

    def find_engine(self) -> None:
        """The one that it knew has ended."""
        self.supervisor.is_open = False
        if self.link is not None:
            self.link.is_open = False
            self.link, self.joined = None, -1
        if not self.ill & {"cut off", "orphaned"}:
            self._connect_supervisor()
        if self.alive:
            self.world.later(0.05, self._connect, self.incarnation)

    def stop(self) -> None:
        """As by SIGSTOP."""
        if self.alive:
            self.silent = True
            stopped = bus.ProcessStopped(rank=self.rank, pid=1, incarnation=self.incarnation, signal=19)
            self.world.later(0.5, self.supervisor.answer, stopped)

    def say(self, message: msgspec.Struct, delay: float) -> None:
        self.world.later(delay, self._said, message, self.link, self.incarnation)

    def _said(self, message: msgspec.Struct, link: Link | None, incarnation: str) -> None:
        if (
            link is not None
            and link is self.link
            and self.alive
            and incarnation == self.incarnation
            and not self.silent
        ):
            link.answer(message)

    def _takes(self, *kinds: str) -> str:
        """A planned fault of one of these kinds, if there is one, or what it is ill with."""
        if lasting := next((one for one in kinds if one in self.ill), ""):
            return lasting
        found = next((one for one in self.plan if one in kinds), "")
        if found:
            self.plan.remove(found)
        return found

    def _receive(self, message: msgspec.Struct) -> None:
        if self.silent:
            return
        match message:
            case bus.Abort():
                self.min_epoch = max(self.min_epoch, message.epoch)
                if self.joined != -2:  # -2: its main thread hangs
                    self.joined = -1
                    self.say(bus.Aborted(epoch=message.epoch, seconds=0.0), 0.001)
            case bus.Rendezvous() | bus.Join() | bus.AllocateCache() | bus.Step() | bus.Scrub() if self.joined == -2:
                pass
            case bus.Rendezvous() if message.epoch >= self.min_epoch:
                self.say(bus.RendezvousOpened(epoch=message.epoch, address="shm:///nowhere"), 0.001)
            case bus.Join() if message.epoch >= self.min_epoch:
                self._join(message)
            case bus.Scrub() if message.epoch >= self.min_epoch and self.corrupt:
                self._fail(message.epoch, -1, Fault.CORRUPTION, "the weights are no longer what was loaded")
            case bus.Scrub() if message.epoch >= self.min_epoch:
                self.say(bus.Scrubbed(epoch=message.epoch, tensors=3), 0.05)
            case bus.AllocateCache() if message.epoch >= self.min_epoch:
                self.say(self.toy.allocate(message), 0.001)
            case bus.Step() if message.epoch >= self.min_epoch:
                self._step(message)
            case _:
                pass

    def _join(self, join: bus.Join) -> None:
        self.toy.at_step, self.toy.moved_at = (join.epoch, -1, True), time.monotonic()
        self.place = (0, False)
        match self._takes("die in join", "hang in join", "raise in join", "slow in join"):
            case "slow in join":
                self.place, self.joined = (1, True), join.epoch
                self.world.later(20.0, self.world.join, self, join)
            case "die in join":
                self.die()
            case "hang in join":
                self.joined = -2
            case "raise in join":
                self._fail(join.epoch, -1, Fault.STEP_FAILED, "raised in joining")
            case _:
                self.place = (1, True)
                self.joined = join.epoch
                self.world.join(self, join)

    def _step(self, step: bus.Step) -> None:
        assert step.epoch == self.joined, "a step for a communicator that this rank is not in"
        self.world.served(step.epoch)
        self.toy.at_step, self.toy.moved_at = (step.epoch, step.step, True), time.monotonic()
        self.place = (3, True)
        if self.toy.finds_nan(step):
            self._fail(step.epoch, step.step, Fault.NON_FINITE, "NaN")
            return
        done = self.toy.compute(step)
        if self.world.is_corrupt():
            done = msgspec.structs.replace(done, fingerprint=done.fingerprint ^ 0xBAD)
        epoch, number = step.epoch, step.step
        match self._takes("hang", "hang outside", "raise", "refuse", "nan", "nan in cache", "context", "odd", "slow"):
            case "hang":  # an abort gets it out
                self.toy.leave_undone(step)
            case "hang outside":
                self.toy.leave_undone(step)
                self.joined, self.place = -2, (2, False)
            case "raise":
                self.toy.leave_undone(step)
                self._fail(epoch, number, Fault.STEP_FAILED, "raised")
            case "refuse":
                self.place = (0, False)
                self._fail(epoch, number, Fault.STEP_FAILED, "could not begin", untouched=True)
            case "nan" | "nan in cache" as kind:
                self.toy.leave_undone(step)
                if kind == "nan in cache":
                    self.toy.spoil_context(step)
                self._fail(epoch, number, Fault.NON_FINITE, "NaN")
            case "context":
                self._fail(epoch, number, Fault.CONTEXT_FAULT, "illegal address")
            case "odd":
                self.say(msgspec.structs.replace(done, fingerprint=done.fingerprint ^ 1), 0.01)
            case "slow":
                self.say(done, 1.0)
            case _:
                self.say(done, self.world.chance.uniform(0.03, 0.1))

    def _fail(self, epoch: int, step: int, fault: Fault, message: str, *, untouched: bool = False) -> None:
        self.say(bus.StepFailed(epoch=epoch, step=step, fault=fault, message=message, untouched=untouched), 0.01)

    # --- the supervisor

    def _execute(self, message: msgspec.Struct) -> None:
        match message:
            case bus.KillWorker() if message.incarnation == self.incarnation:
                self.world.kills += 1
                self.die()
            case bus.ReadProgress():
                records = [self._record()] if self.alive else []
                self.supervisor.answer(bus.ProgressReport(asked=message.asked, records=records))
            case _:
                pass

    def _record(self) -> bus.ProgressRecord:
        self.toy.stands = self.place
        return msgspec.structs.replace(self.toy.record(), incarnation=self.incarnation)


class SpoilingDriver(GroupDriver):
    """Once the group knows of a fault that computes garbage, nothing that the ranks have written may be read again."""

    world: World

    def act(self, action: Action) -> None:
        if isinstance(action, ReportFault) and any(one.fault in GARBAGE for one in action.evidence):
            for rank in self.world.ranks:
                rank.memory.spoil()
        super().act(action)


@dataclass
class World:
    """One schedule of faults, made from its seed."""

    seed: int
    ranks: list[SimRank] = field(default_factory=list)
    kills: int = 0
    newest_epoch: int = 0
    failed: int = 0
    striking: bool = True
    tokens: int = 0

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        self.size = self.chance.randint(1, 3)
        self.config = ServeConfig(
            model="toy", served_name="toy", tensor_parallel_size=self.size, watchdog=Watchdog(floor=1.0),
            limits=EngineLimits(max_batch_tokens=self.chance.choice([4, 16, 64])),
        )  # fmt: skip
        self.state_slots = self.chance.choice([0, 0, 7, 24])
        self.turns: list[tuple[int, ...]] = []  # prompts with their answers
        self.engine = self._new_engine(None)
        self._joining: dict[int, dict[int, SimRank]] = {}

    def _new_engine(self, history: GroupStatus | None) -> Engine:
        engine = Engine(self.config, history)
        engine.group.__class__ = SpoilingDriver
        engine.group.world = self  # type: ignore[attr-defined] # it is one
        engine.set_model(None)
        return engine

    def restart_engine(self) -> None:
        """As its supervisor does: another process, which knows what the one before said last."""
        self.engine = self._new_engine(self.engine.status())
        for rank in self.ranks:
            rank.find_engine()

    def later(self, seconds: float, call: Callable[..., object], *arguments: object) -> None:
        asyncio.get_running_loop().call_later(seconds, call, *arguments)

    def hello(self, role: bus.Role, rank: int, incarnation: str, epoch: int = 0) -> bus.Hello:
        return bus.Hello(
            protocol=bus.PROTOCOL, token="", role=role, group=0, pod_index=rank, pod=f"pod-{rank}", node="n", pid=1,
            incarnation=incarnation, epoch=epoch, rank=rank if role is bus.Role.WORKER else -1,
        )  # fmt: skip

    def join(self, rank: SimRank, join: bus.Join) -> None:
        """Nobody has joined before all have."""
        meeting = self._joining.setdefault(join.epoch, {})
        meeting[rank.rank] = rank
        if len(meeting) == self.size:
            for one in meeting.values():
                if one.joined == join.epoch:
                    one.say(bus.Joined(epoch=join.epoch, seconds=0.0), 0.001)

    def is_corrupt(self) -> bool:
        """A wrong shard is in every rank's sum."""
        return any(rank.corrupt for rank in self.ranks)

    def served(self, epoch: int) -> None:
        assert epoch >= self.newest_epoch, f"epoch {epoch} serves after {self.newest_epoch} did"
        self.newest_epoch = epoch

    # --- the schedule

    async def run(self) -> None:
        serving = asyncio.create_task(self.engine.run())
        self.ranks = [SimRank(self, rank) for rank in range(self.size)]
        try:
            await self.until(lambda: self.engine.status().state is GroupState.READY, "it is ready at first")
            clients = [asyncio.create_task(self._client(number)) for number in range(self.chance.randint(1, 5))]
            for _ in range(self.chance.randint(1, 10)):
                await asyncio.sleep(self.chance.choice([0.01, 0.1, 0.3, 1.0, 5.0]))
                self._strike()
                self._check_budgets()
            self.striking = False
            await asyncio.wait_for(asyncio.gather(*clients), 3_000.0)
            for rank in self.ranks:
                rank.plan.clear()
            await self._rest()
        finally:
            died = serving.exception() if serving.done() else None
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            if died is not None:
                raise AssertionError("the engine died") from died

    def _strike(self) -> None:
        rank = self.chance.choice(self.ranks)
        match self.chance.choice(FAULTS):
            case "die":
                rank.die()
            case "crash":
                rank.crash()
            case "stop":
                rank.stop()
            case "cut":
                rank.cut()
            case "corrupt":
                rank.corrupt = True
            case "crash loop":
                rank.crashes = self.chance.randint(2, 20)
                rank.die()
            case "die in loading":
                rank.plan.append("die in loading")
                rank.die()
            case kind:
                rank.plan.append(kind)

    async def _client(self, number: int) -> None:
        """Every token comes once and is the right one; only a request that was in many failed steps may be given up."""
        await asyncio.sleep(number * 0.1)
        while True:
            await self._request()
            if not self.striking:
                return

    async def _request(self) -> None:
        await asyncio.sleep(self.chance.uniform(0.0, 1.0))
        length, shared = self.chance.randint(1, 20), self.chance.choice([0, 0, 12, 20])
        prompt = (
            *range(min(shared, length - 1)),
            *(self.chance.randrange(1000) for _ in range(max(1, length - shared))),
        )
        if self.turns and self.chance.random() < 0.3:
            prompt = (*self.chance.choice(self.turns)[:50], *prompt)
        count = self.chance.randint(1, min(30, 23 * BLOCK_SIZE - len(prompt)))
        request = GenerationRequest(
            request_id="r", prompt=prompt, max_tokens=count, sampling=SamplingParams(temperature=0)
        )
        tokens: list[int] = []
        right = continuation(prompt, count)
        try:
            async for event in self.engine.generate(request):
                self.tokens += 1
                tokens.append(event.token.token)
                assert tokens == right[: len(tokens)], "a token is wrong, missing or doubled"
            assert tokens == right
            self.turns.append((*prompt, *right))
        except GenerationFailedError as error:
            if not any(words in str(error) for words in ("again and again", "no rank can compute")):
                raise
            self.failed += 1
        except EngineBusyError:
            assert not tokens, "turned away after it had begun"

    def _check_budgets(self) -> None:
        policy = self.engine.group.coordinator.policy
        assert 0 <= policy.rebuilds.left <= REBUILDS
        assert 0 <= policy.respawns.left <= RESPAWNS

    async def _rest(self) -> None:
        """After the faults have ended it serves, and nothing happens any more."""
        await self.until(lambda: self.engine.status().state is GroupState.READY, "it is ready again")
        probe = GenerationRequest(
            request_id="r", prompt=(1, 2, 3), max_tokens=5, sampling=SamplingParams(temperature=0)
        )
        assert [event.token.token async for event in self.engine.generate(probe)] == continuation((1, 2, 3), 5)
        before = (self.engine.status().epoch, self.kills, len(self.engine.status().faults))
        await asyncio.sleep(600.0)
        assert (self.engine.status().epoch, self.kills, len(self.engine.status().faults)) == before, "it is not quiet"
        ids = [fault.id for fault in self.engine.status().faults]
        assert ids == sorted(set(ids))
        assert all(fault.recovered_at is not None for fault in self.engine.status().faults)
        self._check_budgets()

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        begun = time.monotonic()
        while not condition():
            assert time.monotonic() - begun < 3_000.0, f"not in time: {what}; {self.engine.status()}"
            await asyncio.sleep(0.25)
