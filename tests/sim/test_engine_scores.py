"""A prompt's log probabilities come once and whole, in whatever pieces, and however often, it was computed."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from tests.support.fake_ranks import FakeRank, toy_logprob
from tests.support.live_engine import live_engine, request

from lockstep_runtime.config import EngineLimits
from lockstep_runtime.engine.client import TokenEvent
from lockstep_runtime.engine.engine import Engine
from lockstep_runtime.engine.scheduler import SCORED_CHUNK
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.status import Fault
from lockstep_runtime.protocol.step import SampledToken

LIMITS = EngineLimits(max_batch_tokens=48, max_sequences=8)


async def events(engine: Engine, prompt: tuple[int, ...], max_tokens: int) -> list[TokenEvent]:
    asked = request(prompt, max_tokens)
    asked = type(asked)(
        request_id=asked.request_id,
        prompt=prompt,
        max_tokens=max_tokens,
        sampling=msgspec.structs.replace(asked.sampling, prompt_logprobs=0),
    )
    async with asyncio.timeout(20):
        return [event async for event in engine.generate(asked)]


def prompt_of(number: int, length: int) -> tuple[int, ...]:
    return tuple(range(number, number + length))


def is_scored_once(found: list[TokenEvent], prompt: tuple[int, ...]) -> None:
    expected = [toy_logprob(prompt[:end], prompt[end]) for end in range(1, len(prompt))]
    assert [(one.token, one.logprob) for one in found[0].prompt] == list(zip(prompt[1:], expected, strict=True))
    assert not any(event.prompt for event in found[1:])


def third_step_fails(rank: FakeRank) -> None:
    seen = 0

    def misdeed(self: FakeRank, step: bus.Step) -> bus.StepDone | bus.StepFailed:
        nonlocal seen
        seen += 1
        if seen != 3:
            return self.compute(step)
        return bus.StepFailed(epoch=step.epoch, step=step.step, fault=Fault.STEP_FAILED, message="out of memory")

    rank.misdeed = misdeed


async def test_in_chunks_beside_others_and_with_an_answer() -> None:
    async with live_engine(limits=LIMITS, cache_blocks=400) as live:
        prompts = [prompt_of(n, 1 + 70 * n) for n in range(5)]
        for prompt, found in zip(
            prompts, await asyncio.gather(*(events(live.engine, prompt, 3) for prompt in prompts)), strict=True
        ):
            is_scored_once(found, prompt)
            assert len(found) == 3


@pytest.mark.parametrize("rank", [0, 1])
async def test_after_a_repair_in_the_middle_of_the_prompt(rank: int) -> None:
    async with live_engine(limits=LIMITS, cache_blocks=400) as live:
        third_step_fails(live.ranks[rank])
        prompt = prompt_of(7, 500)
        is_scored_once(await events(live.engine, prompt, 3), prompt)
        assert live.engine.stats().recoveries_total == 1


async def test_after_a_process_was_lost_and_its_cache_with_it() -> None:
    async with live_engine(limits=LIMITS, cache_blocks=400) as live:
        prompt = prompt_of(7, 900)
        running = asyncio.create_task(events(live.engine, prompt, 2))
        steps = live.ranks[0].steps
        await live.until(lambda: live.ranks[0].steps > steps + 4, "some chunks are done")
        await live.ranks[0].respawn(crashed=True)
        is_scored_once(await running, prompt)


async def test_after_preemption() -> None:
    async with live_engine(limits=LIMITS, cache_blocks=40) as live:
        prompts = [prompt_of(n, 50) for n in range(6)]
        for prompt, found in zip(
            prompts, await asyncio.gather(*(events(live.engine, prompt, 60) for prompt in prompts)), strict=True
        ):
            is_scored_once(found, prompt)
        assert live.engine.stats().preemptions_total > 0


@pytest.mark.parametrize("length", [SCORED_CHUNK, SCORED_CHUNK + 1, 3 * SCORED_CHUNK + 7])
async def test_a_step_scores_a_bounded_part(length: int) -> None:
    most: list[int] = []

    def watches(self: FakeRank, step: bus.Step) -> bus.StepDone:
        most.extend(len(part.scoring.targets) for part in step.sequences if part.scoring)
        return self.compute(step)

    async with live_engine(cache_blocks=400) as live:
        live.ranks[0].misdeed = watches
        prompt = prompt_of(1, length)
        is_scored_once(await events(live.engine, prompt, 1), prompt)
    assert max(most) <= SCORED_CHUNK
    assert sum(most) == length - 1


def test_a_scored_token_is_small_on_the_wire() -> None:
    top = [(number, -1.5) for number in range(20)]
    scored = [SampledToken(sequence_id=1, token=5, logprob=-1.5, top=top)] * SCORED_CHUNK
    done = bus.StepDone(epoch=1, step=1, seconds=0.1, fingerprint=1, scored=scored)
    assert len(msgspec.msgpack.encode(done)) < bus.MAX_FRAME_BYTES // 100
