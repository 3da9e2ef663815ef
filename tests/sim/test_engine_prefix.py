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


async def test_a_model_with_states_begins_where_both_are_here() -> None:
    async with live_engine(cache_blocks=256, state_slots=23) as live:
        assert await computed_for(live, PROMPT) == 100 + 4
        assert await computed_for(live, PROMPT) == 4 + 4
        assert await computed_for(live, (*PROMPT[:90], 7, 8)) == 92 + 4  # where they part no state was kept
        assert await computed_for(live, (*PROMPT[:90], 9, 9)) == 92 - 88 + 4
        turn = (*PROMPT, *continuation(PROMPT, 5), 1, 2, 3)
        assert await computed_for(live, turn) == len(turn) - 104 + 4
        assert [event.cached for event in await events(live, PROMPT)] == [96] * 3


async def test_it_can_be_switched_off() -> None:
    async with live_engine(cache_blocks=256, limits=EngineLimits(prefix_caching=False)) as live:
        for _ in range(2):
            assert await computed_for(live, PROMPT) == 104
        assert [event.cached for event in await events(live, PROMPT)] == [0] * 3


@pytest.mark.parametrize("state_slots", [0, 23])
@pytest.mark.parametrize("crashed", [False, True])
async def test_a_prefix_outlives_a_killed_process_as_its_cache_does(*, crashed: bool, state_slots: int) -> None:
    async with live_engine(cache_blocks=256, state_slots=state_slots) as live:
        await computed_for(live, PROMPT)
        await live.ranks[1].respawn(crashed=crashed)
        await live.until(lambda: live.engine.status().recoveries == 1, "the group is repaired")
        assert await computed_for(live, PROMPT) == (104 if crashed else 8)


@pytest.mark.parametrize("state_slots", [0, 23])
@pytest.mark.parametrize("fault", [Fault.STEP_FAILED, Fault.CORRUPTION])
async def test_a_fault_that_leaves_garbage_leaves_no_prefix(fault: Fault, state_slots: int) -> None:
    async with live_engine(cache_blocks=256, state_slots=state_slots) as live:
        await computed_for(live, PROMPT)
        fails(live.ranks[1], fault)
        await computed_for(live, (5, 6))
        assert [one.fault for one in live.engine.status().faults] == [fault]
        assert await computed_for(live, PROMPT) == (104 if fault is Fault.CORRUPTION else 8)


@pytest.mark.parametrize("state_slots", [0, 23])
async def test_after_a_nan_what_nobody_has_looked_at_is_not_shared(state_slots: int) -> None:
    async with live_engine(cache_blocks=256, state_slots=state_slots) as live:
        await computed_for(live, PROMPT)
        memory = live.ranks[1].memory
        for slots in memory.slots.values():  # every context that is done, and no other
            slots[:] = [NAN] * len(slots)
        for slot in memory.states.held:
            memory.states.spoil(slot, NAN)
        fails(live.ranks[1], Fault.NON_FINITE)
        await computed_for(live, (5, 6))
        assert [one.fault for one in live.engine.status().faults] == [Fault.NON_FINITE]
        assert await computed_for(live, PROMPT) == 104


@pytest.mark.parametrize("at", range(7))
async def test_a_fault_before_any_step_is_booked_leaves_no_state_of_it(at: int) -> None:
    """Of two prompts that part: every rank has computed the step, and what it has written is garbage after all."""
    other = (*PROMPT[:50], 7, 8, 9)
    async with live_engine(cache_blocks=256, state_slots=23) as live:
        rank, steps = live.ranks[1], live.ranks[1].steps

        def misdeed(self: FakeRank, step: bus.Step) -> bus.StepDone | bus.StepFailed:
            if self.steps <= steps + at:
                return self.compute(step)
            self.misdeed = None
            self.leave_undone(step)
            return bus.StepFailed(epoch=step.epoch, step=step.step, fault=Fault.STEP_FAILED, message="of the test")

        rank.misdeed = misdeed
        assert await live.generate(PROMPT, 3) == continuation(PROMPT, 3)
        assert await live.generate(other, 3) == continuation(other, 3)
        assert rank.misdeed is None
        assert await live.generate(other, 3) == continuation(other, 3)
        assert (await events(live, PROMPT))[0].cached == 96
        assert [one.fault for one in live.engine.status().faults] == [Fault.STEP_FAILED]


def fails(rank: FakeRank, fault: Fault) -> None:
    """Its next step, once."""

    def misdeed(self: FakeRank, step: bus.Step) -> bus.StepFailed:
        self.misdeed = None
        return bus.StepFailed(epoch=step.epoch, step=step.step, fault=fault, message="a fault of the test")

    rank.misdeed = misdeed
