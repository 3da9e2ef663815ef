"""Prefixes that stand in the cache, through faults: what the answers are never depends on it, what is computed does."""

from __future__ import annotations

import pytest
from tests.support.fake_ranks import NAN, FakeRank, continuation
from tests.support.live_engine import LiveEngine, live_engine, request

from lockstep_runtime.config import EngineLimits
from lockstep_runtime.engine.client import TokenEvent
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.status import Fault

PROMPT = tuple(range(100))


async def computed_for(live: LiveEngine, prompt: tuple[int, ...], count: int = 5) -> int:
    """Tokens that rank 0 is fed until the answer, which is right, is there."""
    before = live.ranks[0].fed
    assert await live.generate(prompt, count) == continuation(prompt, count)
    return live.ranks[0].fed - before


async def events(live: LiveEngine, prompt: tuple[int, ...]) -> list[TokenEvent]:
    return [event async for event in live.engine.generate(request(prompt, 3))]


async def test_what_two_prompts_begin_with_is_computed_once() -> None:
    async with live_engine(cache_blocks=256) as live:
        assert await computed_for(live, PROMPT) == 100 + 4
        assert await computed_for(live, (*PROMPT[:90], 7, 8)) == 92 - 88 + 4  # a block has 4 tokens
        assert await computed_for(live, PROMPT) == 4 + 4  # the last block's: a token has to be drawn from
        stats = live.engine.stats()
        assert (stats.prefix_cache_queries_total, stats.prefix_cache_hits_total) == (100 + 92 + 100, 88 + 96)
        assert [event.cached for event in await events(live, PROMPT)] == [96] * 3


async def test_an_answer_is_the_next_turns_beginning() -> None:
    async with live_engine(cache_blocks=256) as live:
        await computed_for(live, PROMPT, 40)
        turn = (*PROMPT, *continuation(PROMPT, 40), 1, 2, 3)
        assert await computed_for(live, turn) == len(turn) - 136 + 4


async def test_it_can_be_switched_off() -> None:
    async with live_engine(cache_blocks=256, limits=EngineLimits(prefix_caching=False)) as live:
        for _ in range(2):
            assert await computed_for(live, PROMPT) == 104
        assert [event.cached for event in await events(live, PROMPT)] == [0] * 3


@pytest.mark.parametrize("crashed", [False, True])
async def test_a_prefix_outlives_a_killed_process_as_its_cache_does(*, crashed: bool) -> None:
    async with live_engine(cache_blocks=256) as live:
        await computed_for(live, PROMPT)
        await live.ranks[1].respawn(crashed=crashed)
        await live.until(lambda: live.engine.status().recoveries == 1, "the group is repaired")
        assert await computed_for(live, PROMPT) == (104 if crashed else 8)


@pytest.mark.parametrize("fault", [Fault.STEP_FAILED, Fault.CORRUPTION])
async def test_a_fault_that_leaves_garbage_leaves_no_prefix(fault: Fault) -> None:
    async with live_engine(cache_blocks=256) as live:
        await computed_for(live, PROMPT)
        fails(live.ranks[1], fault)
        await computed_for(live, (5, 6))
        assert [one.fault for one in live.engine.status().faults] == [fault]
        assert await computed_for(live, PROMPT) == (104 if fault is Fault.CORRUPTION else 8)


async def test_after_a_nan_what_nobody_has_looked_at_is_not_shared() -> None:
    async with live_engine(cache_blocks=256) as live:
        await computed_for(live, PROMPT)
        for slots in live.ranks[1].memory.slots.values():  # every context that is done, and no other
            slots[:] = [NAN] * len(slots)
        fails(live.ranks[1], Fault.NON_FINITE)
        await computed_for(live, (5, 6))
        assert [one.fault for one in live.engine.status().faults] == [Fault.NON_FINITE]
        assert await computed_for(live, PROMPT) == 104


def fails(rank: FakeRank, fault: Fault) -> None:
    """Its next step, once."""

    def misdeed(self: FakeRank, step: bus.Step) -> bus.StepFailed:
        self.misdeed = None
        return bus.StepFailed(epoch=step.epoch, step=step.step, fault=fault, message="a fault of the test")

    rank.misdeed = misdeed
