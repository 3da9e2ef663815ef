"""Two operators and a Lease; one is paused in the middle of its work: the other goes on, and nothing is done twice."""

from __future__ import annotations

import asyncio
import itertools
from random import Random
from typing import Any, Final

import pytest
from tests.support.fault_world import FaultWorld, Illness, shape
from tests.support.virtual_loop import run_virtually

from lockstep_operator.cluster.client import Kube, KubeError
from lockstep_operator.cluster.election import LEASE_SECONDS, Candidate, Election
from lockstep_operator.types.names import ModelKey
from lockstep_operator.types.recovery_state import Rung

RECOVERY: Final[dict[str, Any]] = {
    "budget": {"attempts": 2, "window": "20m"},
    "backoff": {"initial": "5s", "max": "2m"},
}
TAKES_OVER_SECONDS: Final = 20.0


class Process:
    """Of an operator. Paused, it asks afterwards what it was about to ask, and hears then what it was answered."""

    def __init__(self, kube: Kube, name: str) -> None:
        self._kube = kube
        self.runs = asyncio.Event()
        self.runs.set()
        self.pause_at = -1  # requests from now
        self.pause_after = False  # the request has reached the API server, and not the answer the process
        now = asyncio.get_running_loop().time
        self.election = Election(self.connection(fenced=False), Candidate("lockstep-system", "lockstep", name), now)
        self.task = asyncio.create_task(self._live())
        self.ended = ""

    async def _live(self) -> None:
        await self.election.won()
        self.ended = await self.election.lost()

    def connection(self, *, fenced: bool) -> Any:
        process = self

        class Connection:
            def __getattr__(self, verb: str) -> Any:
                async def ask(*arguments: Any, **options: Any) -> Any:
                    if fenced and not process.election.leads():
                        raise KubeError(0, "NotLeading", "another operator leads")
                    pauses = fenced and process.pause_at == 0
                    process.pause_at -= fenced
                    if pauses and not process.pause_after:
                        process.runs.clear()
                    await process.runs.wait()
                    answer = await getattr(process._kube, verb)(*arguments, **options)
                    if pauses and process.pause_after:
                        process.runs.clear()
                    await process.runs.wait()
                    return answer

                return ask

        return Connection()


class LeasedWorld(FaultWorld):
    """Its operators work only while they lead. Time is the loop's."""

    def __init__(self, random: Random) -> None:
        self.processes: list[Process] = []
        super().__init__(random, operators=0)
        for name in "ab":
            self.processes.append(Process(self.kube, name))
            self.operators.append(self.operator())
        self._passes: dict[int, asyncio.Task[None]] = {}

    def connection(self) -> Any:
        return self.processes[-1].connection(fenced=True)

    async def second(self, key: ModelKey) -> None:
        """Everybody does what they can."""
        for number, process in enumerate(self.processes):
            running = self._passes.get(number)
            if process.election.leads() and (running is None or running.done()):
                self._passes[number] = asyncio.create_task(self.look(key, number))
        await asyncio.sleep(1)
        for happens in self.kube.steps(self.broken):
            happens()
        self.time += 1

    async def seconds(self, key: ModelKey, count: int) -> None:
        for _ in range(count):
            await self.second(key)

    def leader(self) -> Process | None:
        leaders = [process for process in self.processes if process.election.leads()]
        assert len(leaders) <= 1
        return leaders[0] if leaders else None

    async def close(self) -> None:
        tasks = [*(process.task for process in self.processes), *self._passes.values()]
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result


async def paused_in_a_recovery(request: int, *, after: bool, seconds: int) -> bool:
    """The leader is paused around its so-manieth request of a recovery, for so long; whether it ever made so many."""
    world = LeasedWorld(Random(request))
    key = world.add(recovery=RECOVERY)
    await world.seconds(key, 30)
    first = world.leader()
    assert first is not None
    assert world.serving(key) == 1
    wanted = shape(world)
    sick = [pod["metadata"]["uid"] for pod in world.sick.pods(key, 0)][1:]
    world.sick.ill[key, 0] = Illness(rank=1, pods=frozenset(sick))

    first.pause_at, first.pause_after = request, after
    for waited in itertools.count():
        if not first.runs.is_set():
            break
        if waited > 60:
            await world.close()
            return False
        await world.second(key)
    await world.seconds(key, seconds)
    if seconds > TAKES_OVER_SECONDS:
        second = world.leader()
        assert second is not None
        assert second is not first
        assert world.serving(key) == 1, "it has gone on where the first stopped"
    first.runs.set()
    await world.seconds(key, 40)

    assert bool(first.ended) == (seconds > LEASE_SECONDS)
    assert world.serving(key) == 1
    assert shape(world) == wanted
    status = world.status(key)
    assert [plan.rung for plan, _ in world.plans[0]] == [Rung.RECYCLE_POD], "no step twice, none left out"
    assert status["recoveries"] == 1
    assert [uid for kind, _, uid, _ in world.kube.deleted if kind == "Pod"].count(sick[0]) == 1
    await world.close()
    return True


@pytest.mark.parametrize("after", [False, True])
def test_a_leader_paused_around_a_request_of_a_recovery_repeats_nothing(after: bool) -> None:
    """Around every fifth: where it was paused, the operator that was killed there is tested for all of them."""
    for request in itertools.count(2 * after, 5):
        if not run_virtually(paused_in_a_recovery(request, after=after, seconds=40)):
            assert request > 20, "a recovery takes more requests than that"
            return


def test_a_leader_paused_for_a_moment_stays_the_leader() -> None:
    assert run_virtually(paused_in_a_recovery(7, after=True, seconds=2))
