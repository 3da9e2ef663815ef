"""A real engine and bus on a free port, with fake ranks and a supervisor that does as it is told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import msgspec
from tests.support.fake_ranks import TOKEN, FakeRank
from tests.support.ports import free_port

from lockstep_runtime.config import EngineLimits, ServeConfig, Watchdog
from lockstep_runtime.engine.client import GenerationRequest
from lockstep_runtime.engine.engine import Engine
from lockstep_runtime.host.addresses import listen
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.status import GroupState, GroupStatus
from lockstep_runtime.protocol.step import SamplingParams
from lockstep_runtime.recovery.bus_server import BusServer
from lockstep_runtime.supervisor.bus_client import BusClient

DEADLINE = 20.0
QUICK = Watchdog(step_timeout=10.0)


@dataclass
class LiveEngine:
    config: ServeConfig
    engine: Engine
    ranks: list[FakeRank]
    reports: list[GroupStatus] = field(default_factory=list)
    told: list[bus.ToSupervisor] = field(default_factory=list)
    readiness: dict[int, list[bus.GroupReadiness]] = field(default_factory=dict)  # that members were told
    links: dict[int, BusClient] = field(default_factory=dict)
    supervisors: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    killings: list[asyncio.Task[None]] = field(default_factory=list)

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a condition, with a deadline."""
        try:
            async with asyncio.timeout(DEADLINE):
                while not condition():  # noqa: ASYNC110 - a condition of any kind has no event
                    await asyncio.sleep(0.005)
        except TimeoutError:
            raise AssertionError(f"not within {DEADLINE:g} s: {what}; {self.engine.status()}") from None

    async def ready(self) -> None:
        await self.until(lambda: self.engine.status().state is GroupState.READY, "the group is ready")

    async def generate(self, prompt: tuple[int, ...], max_tokens: int) -> list[int]:
        async with asyncio.timeout(DEADLINE):
            return [event.token.token async for event in self.engine.generate(request(prompt, max_tokens))]

    def supervise(self, pod_index: int) -> None:
        """A pod's supervisor connects."""
        self.supervisors[pod_index] = asyncio.create_task(_supervise(self, pod_index))

    async def unsupervised(self, pod_index: int) -> None:
        """It has ended, as the engine knows."""
        task = self.supervisors.pop(pod_index)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await self.until(lambda: pod_index not in self.engine.group.supervisors, "its connection is closed")

    def kills(self) -> list[tuple[int, bool]]:
        """The processes that were to be killed: of which rank, and whether the next is to load again."""
        return [(one.rank, one.reload) for one in self.told if isinstance(one, bus.KillWorker)]

    def obey(self, pod_index: int, message: bus.ToSupervisor) -> None:
        """A supervisor's part: status is kept, a kill is carried out."""
        if isinstance(message, bus.StatusReport):
            self.reports.append(message.status)
            return
        if isinstance(message, bus.ReadProgress):
            records = [rank.record() for rank in self.ranks if rank.rank == pod_index]
            self.links[pod_index].send(bus.ProgressReport(asked=message.asked, records=records))
            return
        if isinstance(message, bus.GroupReadiness):
            self.readiness.setdefault(pod_index, []).append(message)
            return
        self.told.append(message)
        if isinstance(message, bus.KillWorker) and self.ranks[message.rank].incarnation == message.incarnation:
            self.killings.append(asyncio.create_task(self._kill(message)))

    async def _kill(self, message: bus.KillWorker) -> None:
        rank = self.ranks[message.rank]
        await rank.respawn()
        exited = bus.ProcessExited(rank=rank.rank, pid=1000 + rank.rank, incarnation=message.incarnation, signal=9)
        self.links[rank.rank].send(exited)


def request(prompt: tuple[int, ...], max_tokens: int, stop: frozenset[int] = frozenset()) -> GenerationRequest:
    return GenerationRequest(
        request_id="test",
        prompt=prompt,
        max_tokens=max_tokens,
        sampling=SamplingParams(temperature=0),
        stop_token_ids=stop,
    )


@contextlib.asynccontextmanager
async def live_engine(
    *,
    ranks: int = 2,
    limits: EngineLimits | None = None,
    cache_blocks: int = 64,
    state_slots: int = 0,
    start: bool = True,
    supervisors: bool = True,
    watchdog: Watchdog = QUICK,
    history: GroupStatus | None = None,
    strangers: int = 64,
    **config: object,
) -> AsyncIterator[LiveEngine]:
    """One rank per pod; ready when it is entered, unless `start` is off."""
    settings = msgspec.structs.replace(
        ServeConfig(
            model="toy",
            served_name="toy",
            tensor_parallel_size=ranks,
            bus_port=free_port(),
            limits=limits or EngineLimits(),
            watchdog=watchdog,
        ),
        **config,
    )
    engine = Engine(settings, history)
    engine.set_model(None)
    bus = BusServer(TOKEN, engine.group, strangers=strangers)
    await bus.open(listen("127.0.0.1", settings.bus_port))
    fakes = [FakeRank(settings, rank, cache_blocks, state_slots) for rank in range(ranks)]
    live = LiveEngine(settings, engine, fakes)
    tasks = [asyncio.create_task(engine.run()), asyncio.create_task(engine.report())]
    if supervisors:
        for pod_index in range(ranks):
            live.supervise(pod_index)
    if start:
        for rank in live.ranks:
            rank.start()
        await live.ready()
    try:
        yield live
    finally:
        tasks += live.supervisors.values()
        failed = [task.exception() for task in tasks if task.done()]
        for rank in live.ranks:
            await rank.die()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await bus.close()
        assert not failed, failed


async def _supervise(live: LiveEngine, pod_index: int) -> None:
    config = msgspec.structs.replace(live.config, pod_index=pod_index)
    link = BusClient(config, TOKEN, f"s{pod_index}", lambda message: live.obey(pod_index, message), lambda: None)
    live.links[pod_index] = link
    await link.run()
