"""Time that ranks are given while they join, and that nobody waits longer than he must for what is known."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from tests.support.fake_ranks import continuation
from tests.support.sim_world import SimRank, World
from tests.support.virtual_loop import run_virtually

from lockstep_runtime.engine.client import GenerationRequest
from lockstep_runtime.protocol.status import GroupState
from lockstep_runtime.protocol.step import SamplingParams
from lockstep_runtime.recovery.stage import Stage


class Joining(World):
    """Two ranks that serve, and then what the test does to them."""

    def __init__(self, act: Callable[[Joining], Coroutine[Any, Any, None]]) -> None:
        super().__init__(seed=next(seed for seed in range(100) if _ranks(seed) == 2))
        self._act = act

    async def run(self) -> None:
        serving = asyncio.create_task(self.engine.run())
        self.ranks += [SimRank(self, rank) for rank in range(self.size)]
        try:
            await self.until(lambda: self.engine.status().state is GroupState.READY, "it is ready")
            await self._act(self)
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)

    async def answer(self) -> list[int]:
        sampling = SamplingParams(temperature=0)
        request = GenerationRequest(request_id="r", prompt=(1, 2, 3), max_tokens=10, sampling=sampling)
        return [event.token.token async for event in self.engine.generate(request)]


async def _soon(condition: Callable[[], bool]) -> None:
    """To the millisecond."""
    while not condition():  # noqa: ASYNC110 - a condition of any kind has no event
        await asyncio.sleep(0.001)


def _ranks(seed: int) -> int:
    return World(seed).size


@pytest.fixture(autouse=True)
def quiet() -> object:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_ranks_that_all_wait_for_the_network_are_given_time() -> None:
    async def act(world: Joining) -> None:
        world.ranks[1].plan.append("slow in join")
        world.ranks[0].cut()
        begun = time.monotonic()
        assert await world.answer() == continuation((1, 2, 3), 10)
        assert time.monotonic() - begun > 20.0
        assert len(world.engine.status().faults) == 1
        assert world.kills == 0

    run_virtually(Joining(act).run())


def test_a_rank_that_has_not_come_to_the_meeting_place_is_given_none() -> None:
    async def act(world: Joining) -> None:
        world.ranks[1].plan.append("hang in join")
        world.ranks[0].cut()
        begun = time.monotonic()
        assert await world.answer() == continuation((1, 2, 3), 10)
        assert time.monotonic() - begun < 30.0
        assert world.kills == 1

    run_virtually(Joining(act).run())


def test_where_another_rank_has_begun_the_step_nobody_waits_for_it_to_refuse() -> None:
    async def act(world: Joining) -> None:
        answer = asyncio.create_task(world.answer())
        await world.until(lambda: world.engine.stats().requests_running == 1, "it runs")
        world.ranks[1].plan.append("refuse")
        await _soon(lambda: not world.ranks[1].plan)
        refused = time.monotonic()
        await _soon(lambda: world.engine.group.stage is not Stage.SERVING)
        assert time.monotonic() - refused < 0.05
        assert await answer == continuation((1, 2, 3), 10)

    run_virtually(Joining(act).run())
