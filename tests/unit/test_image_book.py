"""Which images a step encodes, and what the ranks hold of them: by example, and over random lives."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from tests.support.live_engine import request

from lockstep_runtime.engine.client import GenerationRequest, PromptImage
from lockstep_runtime.engine.image_book import STEP_TOKENS, ImageBook
from lockstep_runtime.engine.scheduler import Scheduler
from lockstep_runtime.engine.sequence import Sequence
from lockstep_runtime.protocol.bus import ImageWork
from lockstep_runtime.protocol.images import HELD_TOKENS, ImageSpan, Pixels
from lockstep_runtime.protocol.step import SampledToken, SequenceSlice


def prompt_image(name: str, start: int, rows: int, columns: int) -> PromptImage:
    pixels = Pixels(height=rows, width=columns, data=name.encode(), digest=name)
    return PromptImage(ImageSpan(digest=name, start=start, rows=rows, columns=columns), pixels)


def with_images(tokens: int, *images: tuple[str, int, int, int], answer: int = 2) -> GenerationRequest:
    found = tuple(prompt_image(*one) for one in images)
    return GenerationRequest(
        request_id="test", prompt=tuple(range(tokens)), max_tokens=answer, sampling=request((1,), 1).sampling,
        images=found,
    )  # fmt: skip


def scheduler(budget: int = 100, blocks: int = 1000) -> Scheduler:
    return Scheduler(max_sequences=16, max_batch_tokens=budget, max_model_len=20_000, blocks=blocks, block_size=16)


@dataclass
class Ranks:
    """What every rank holds, and what must be so."""

    pixels: set[str] = field(default_factory=set)
    tokens: dict[str, int] = field(default_factory=dict)
    encoded: int = 0

    def step(self, slices: list[SequenceSlice], work: ImageWork, pixels: list[Pixels], sizes: dict[str, int]) -> None:
        assert [image.digest for image in pixels] == work.encode
        self.pixels -= set(work.drop) - set(work.encode)
        for digest in work.drop:
            self.tokens.pop(digest, None)
        self.pixels |= set(work.encode)
        for digest in work.encode:
            assert digest not in self.tokens, "an image is encoded twice"
            self.tokens[digest] = sizes[digest]
            self.encoded += 1
        assert len(work.encode) <= 1 or sum(sizes[one] for one in work.encode) <= STEP_TOKENS
        assert sum(self.tokens.values()) <= max(HELD_TOKENS, max(sizes.values(), default=0))
        for part in slices:
            assert part.tokens
            for span in part.images:
                assert span.digest in self.tokens, "a slice needs what is not there"


def finish(book: Scheduler, slices: list[SequenceSlice]) -> None:
    drawn = [SampledToken(sequence_id=part.sequence_id, token=1) for part in slices if part.sample is not None]
    book.apply(slices, drawn)


def test_a_prompt_is_cut_within_an_image_which_is_encoded_once() -> None:
    plan = scheduler(budget=30)
    plan.add(Sequence(1, with_images(100, ("cat", 10, 6, 10))))
    ranks = Ranks()
    seen: list[tuple[int, int, list[str], int]] = []
    while slices := plan.plan():
        work, pixels = plan.images.work()
        ranks.step(slices, work, pixels, {"cat": 60})
        [part] = slices
        seen.append((part.position, len(part.tokens), [span.digest for span in part.images], part.shift))
        finish(plan, slices)
    assert seen == [
        (0, 30, ["cat"], 0), (30, 30, ["cat"], 0), (60, 30, ["cat"], 0), (90, 10, [], -50), (100, 1, [], -50),
    ]  # fmt: skip
    assert ranks.encoded == 1


def test_equal_images_of_several_requests_are_encoded_once() -> None:
    plan, ranks = scheduler(budget=500), Ranks()
    for number in range(4):
        plan.add(Sequence(number, with_images(60, ("cat", 5, 5, 5), ("cat", 32, 5, 5))))
    while slices := plan.plan():
        ranks.step(slices, *plan.images.work(), {"cat": 25})
        finish(plan, slices)
    plan.add(Sequence(9, with_images(60, ("cat", 1, 5, 5))))
    while slices := plan.plan():
        ranks.step(slices, *plan.images.work(), {"cat": 25})
        finish(plan, slices)
    assert ranks.encoded == 1


def test_a_step_encodes_one_large_image_or_several_small_ones() -> None:
    plan, ranks = scheduler(budget=2000), Ranks()
    plan.add(Sequence(1, with_images(1200, ("a", 10, 20, 28), ("b", 600, 20, 28))))
    slices = plan.plan()
    assert [len(part.tokens) for part in slices] == [600]
    ranks.step(slices, *plan.images.work(), {"a": 560, "b": 560})
    small = scheduler(budget=2000)
    small.add(Sequence(1, with_images(1200, ("a", 10, 10, 28), ("b", 600, 10, 28))))
    assert [len(part.tokens) for part in small.plan()] == [1200]
    assert small.images.work()[0].encode == ["a", "b"]


def test_a_failed_step_is_planned_again_with_its_images() -> None:
    plan = scheduler(budget=30)
    plan.add(Sequence(1, with_images(100, ("cat", 10, 6, 10))))
    first = (plan.plan(), plan.images.work())
    plan.forget_images()
    assert (plan.plan(), plan.images.work()) == first
    finish(plan, first[0])
    plan.forget_images()  # in the middle of the image, with the caches kept
    slices = plan.plan()
    assert slices[0].position == 30
    assert plan.images.work()[0] == ImageWork(encode=["cat"])


def test_what_nobody_needs_any_more_is_dropped_in_the_next_epoch() -> None:
    plan = scheduler()
    plan.add(Sequence(1, with_images(60, ("cat", 5, 5, 5), answer=1)))
    slices = plan.plan()
    plan.images.work()
    finish(plan, slices)
    plan.forget_images()
    plan.add(Sequence(2, with_images(60, ("dog", 5, 5, 5), answer=1)))
    plan.plan()
    assert plan.images.work()[0] == ImageWork(drop=["cat"], encode=["dog"])


def test_pixels_of_a_request_that_is_cancelled_after_a_fault_are_dropped() -> None:
    plan = scheduler()
    plan.add(Sequence(1, with_images(60, ("cat", 5, 5, 5))))
    plan.plan()
    plan.images.work()
    plan.forget_images()
    plan.remove(1)
    plan.add(Sequence(2, with_images(60)))
    plan.plan()
    assert plan.images.work()[0] == ImageWork(drop=["cat"])


def test_pixels_count_once() -> None:
    plan = scheduler()
    plan.add(Sequence(1, with_images(60, ("cat", 5, 5, 5), ("horse", 32, 5, 5))))
    plan.add(Sequence(2, with_images(60, ("cat", 5, 5, 5))))
    assert plan.image_bytes == len("cathorse")


def test_random_lives_end_and_no_step_lacks_an_image() -> None:
    """Images up to more than the ranks hold at once, equal ones, small budgets, preemptions, faults, cancellations."""
    seed = random.randrange(2**32)
    print("seed", seed)
    drawn = random.Random(seed)
    for _ in range(60):
        sizes = {name: drawn.choice([4, 60, 576, 3000, 9000]) for name in "abcdef"}
        plan, ranks = scheduler(drawn.choice([16, 700, 4000]), blocks=drawn.choice([1300, 3000])), Ranks()
        alive = set(range(drawn.randint(1, 8)))
        for number in alive:
            images, length = [], drawn.randint(1, 50)
            for name in drawn.choices("abcdef", k=drawn.randint(0, 3)):
                if length + sizes[name] < 18_000:
                    images.append((name, length, 1, sizes[name]))
                    length += sizes[name] + drawn.randint(1, 50)
            plan.add(Sequence(number, with_images(length, *images)))
        steps = 0
        while slices := plan.plan():
            steps += 1
            assert steps < 20_000, "it does not end"
            fate = drawn.random()
            work, pixels = plan.images.work()
            if fate < 0.05:  # the step fails, before or after it reached the ranks
                if fate < 0.03:
                    ranks.step(slices, work, pixels, sizes)
                ranks.tokens.clear()
                if fate < 0.02:
                    plan.start_over(max_model_len=20_000, blocks=plan.book.total, block_size=16)
                plan.forget_images()
            else:
                ranks.step(slices, work, pixels, sizes)
                finish(plan, slices)
            if fate > 0.99:
                plan.remove(drawn.choice(sorted(alive)))
        assert not plan.running
        assert not plan.waiting


def test_an_empty_book_has_no_work() -> None:
    book = ImageBook()
    book.begin([])
    assert book.work() == (ImageWork(), [])
