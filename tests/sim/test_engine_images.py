"""Images and the engine, over a real bus, with ranks that fail: pixels travel once, a new process gets them again, and
the tokens are those of a life without faults."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import msgspec
import pytest
from tests.support.fake_ranks import FakeRank, continuation
from tests.support.live_engine import LiveEngine, live_engine, request
from tests.support.toy_images import seen, toy_image

from lockstep_runtime.config import EngineLimits
from lockstep_runtime.engine.client import EngineBusyError, GenerationRequest, PromptImage
from lockstep_runtime.engine.engine import MOST_IMAGE_BYTES
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.images import Pixels, digest_of
from lockstep_runtime.protocol.status import Fault

SMALL = EngineLimits(max_batch_tokens=8, max_sequences=8)
ANSWER = 12


def asked(length: int, *images: PromptImage, answer: int = ANSWER) -> GenerationRequest:
    prompt = tuple(range(100, 100 + length))
    return replace(request(prompt, answer), images=images)


def expected(one: GenerationRequest) -> list[int]:
    return continuation(seen(one.prompt, one.images), one.max_tokens)


async def answer(live: LiveEngine, one: GenerationRequest) -> list[int]:
    async with asyncio.timeout(60):
        return [event.token.token async for event in live.engine.generate(one)]


def sizes(*images: PromptImage) -> dict[str, int]:
    return {image.pixels.digest: len(image.pixels.data) for image in images}


async def test_pixels_travel_once_and_equal_images_are_encoded_once() -> None:
    cat, dog = (5, 4, 5), (40, 3, 6)
    async with live_engine(limits=SMALL) as live:
        first = asked(70, toy_image(1, *cat), toy_image(2, *dog))
        second = asked(66, toy_image(1, 30, 4, 5))
        both = await asyncio.gather(answer(live, first), answer(live, second))
        assert list(both) == [expected(first), expected(second)]
        assert await answer(live, second) == expected(second)
        for rank in live.ranks:
            assert rank.images.received == sizes(*first.images)
            assert rank.images.encodings == 2


async def test_a_large_image_travels_in_parts() -> None:
    async with live_engine(limits=SMALL) as live:
        one = asked(20, toy_image(1, 2, 3, 5))
        data = random.Random(2).randbytes(3 * 1000 * 1000)
        large = Pixels(height=1000, width=1000, data=data, digest=digest_of(1000, 1000, data))
        assert len(data) > 2 * bus.IMAGE_PART_BYTES
        span = msgspec.structs.replace(one.images[0].span, digest=large.digest)
        one = replace(one, images=(PromptImage(span, large),))
        assert await answer(live, one) == expected(one)
        assert all(rank.images.received == sizes(*one.images) for rank in live.ranks)


@pytest.mark.parametrize("rank", [0, 1])
async def test_a_new_process_gets_the_pixels_again_and_the_others_do_not(rank: int) -> None:
    async with live_engine(limits=SMALL) as live:
        one = asked(64, toy_image(1, 4, 7, 8), answer=100)
        running = asyncio.create_task(answer(live, one))
        await live.until(lambda: live.ranks[rank].images.encodings == 1, "the image is encoded")
        await live.ranks[rank].respawn(crashed=True)  # its cache is lost, too: all is computed again
        assert await running == expected(one)
        assert all(one_rank.images.received == sizes(*one.images) for one_rank in live.ranks)
        assert live.ranks[1 - rank].images.encodings == 2  # together with the new one


def fails(rank: FakeRank, fault: Fault) -> None:
    def misdeed(self: FakeRank, step: bus.Step) -> bus.StepFailed:
        self.misdeed = None
        return bus.StepFailed(epoch=step.epoch, step=step.step, fault=fault, message="on purpose")

    rank.misdeed = misdeed


async def test_too_many_pixels_are_turned_away() -> None:
    async with live_engine(limits=SMALL) as live:
        one = asked(20, toy_image(1, 2, 3, 5))
        [image] = one.images
        huge = msgspec.structs.replace(image.pixels, data=bytes(MOST_IMAGE_BYTES // 2 + 1), digest="x")
        filling = [
            asked(20, PromptImage(image.span, msgspec.structs.replace(huge, digest=str(number))), answer=1)
            for number in range(2)
        ]
        live.ranks[0].misdeed = lambda rank, step: None  # nothing gets any further
        streams = [live.engine.generate(one) for one in filling]
        with pytest.raises(EngineBusyError, match="too many images"):
            await anext(live.engine.generate(one))
        for stream in streams:
            await stream.aclose()


@pytest.mark.parametrize("life", range(6))
async def test_random_faults_change_no_token(life: int) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    drawn = random.Random(seed)
    limits = EngineLimits(max_batch_tokens=drawn.choice([4, 8, 32]), max_sequences=4)
    async with live_engine(limits=limits, cache_blocks=drawn.choice([40, 120])) as live:
        requests = []
        for _ in range(5):
            start, images = drawn.randint(1, 9), []
            for _ in range(drawn.randint(0, 3)):
                images.append(toy_image(drawn.randint(0, 4), start, drawn.randint(1, 4), drawn.randint(1, 5)))
                start = images[-1].span.stop + drawn.randint(1, 6)
            requests.append(asked(start, *images, answer=drawn.randint(1, 40)))
        running = [asyncio.create_task(answer(live, one)) for one in requests]
        for is_lost in drawn.sample([True, False], 2):  # more in a row, and a request would be given up
            victim = drawn.choice(live.ranks)
            steps = victim.steps + drawn.randint(1, 12)
            await live.until(
                lambda victim=victim, steps=steps: victim.steps >= steps or all(one.done() for one in running),  # type: ignore[misc]
                "some more steps are done",
            )
            if is_lost:
                await victim.respawn(crashed=drawn.random() < 0.5)
            else:
                fails(victim, drawn.choice([Fault.STEP_FAILED, Fault.NON_FINITE]))
        assert await asyncio.gather(*running) == [expected(one) for one in requests]
