"""Prefills share a step: nobody waits for a long prompt, and a long prompt waits for nobody."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lockstep_runtime.engine.client import GenerationRequest
from lockstep_runtime.engine.scheduler import Scheduler
from lockstep_runtime.engine.sequence import Sequence
from lockstep_runtime.engine.shares import share
from lockstep_runtime.protocol.step import SampledToken, SamplingParams

WANTED = st.lists(st.one_of(st.just(1), st.integers(2, 40), st.integers(2, 40_000)), min_size=1, max_size=30)


@given(WANTED, st.integers(0, 3000))
def test_a_step_is_full_and_everyone_has_what_is_due(wanted: list[int], spare: int) -> None:
    budget = len(wanted) + spare
    counts = share(wanted, budget)
    assert all(0 <= count <= want for count, want in zip(counts, wanted, strict=True))
    assert sum(counts) == min(budget, sum(wanted))
    assert all(count == 1 for count, want in zip(counts, wanted, strict=True) if want == 1)
    prefills = [index for index, want in enumerate(wanted) if want > 1]
    if prefills:
        oldest, left = prefills[0], budget - wanted.count(1)
        assert counts[oldest] == wanted[oldest] or counts[oldest] >= left / 2
        for index in prefills:
            if counts[index] < wanted[index]:  # what is longer, and came later, has nothing before it
                assert not any(counts[other] for other in prefills if other > index and wanted[other] > wanted[index])


def test_the_oldest_that_gets_all_it_wants_leaves_half_of_the_rest_to_the_next() -> None:
    assert share([2, 30, 10], 20) == [2, 9, 9]


class Machine:
    """A scheduler; `first[id]` is the step in which a sequence drew its first token."""

    def __init__(self, budget: int = 2048, blocks: int = 100_000) -> None:
        self.scheduler = Scheduler(
            max_sequences=64, max_batch_tokens=budget, max_model_len=50_000, blocks=blocks, block_size=16
        )
        self.steps = 0
        self.first: dict[int, int] = {}
        self.drawn: dict[int, list[int]] = {}

    def add(self, id: int, prompt: int, max_tokens: int = 4) -> None:
        request = GenerationRequest(
            request_id=str(id), prompt=(5,) * prompt, max_tokens=max_tokens, sampling=SamplingParams()
        )
        self.scheduler.add(Sequence(id, request))

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.steps += 1
            slices = self.scheduler.plan()
            sampled = [SampledToken(sequence_id=part.sequence_id, token=7) for part in slices if part.sample]
            for one in self.scheduler.apply(slices, sampled):
                self.first.setdefault(one.sequence_id, self.steps)
                self.drawn.setdefault(one.sequence_id, []).append(self.steps)


@given(st.lists(st.integers(10_000, 40_000), min_size=1, max_size=4), st.integers(1, 900), st.integers(0, 9))
def test_a_short_prompt_behind_long_ones_draws_at_once(longs: list[int], short: int, before: int) -> None:
    machine = Machine()
    for id, prompt in enumerate(longs, 1):
        machine.add(id, prompt)
    machine.step(before)
    machine.add(99, short)
    machine.step()
    if set(machine.first) <= {99}:
        assert machine.first == {99: before + 1}
    else:  # a long one was done just then
        machine.step()
        assert machine.first[99] <= before + 2


@given(st.integers(10_000, 40_000), st.integers(100, 2000), st.integers(1, 4))
def test_a_long_prompt_takes_no_more_than_twice_its_time_whatever_comes_after_it(long: int, short: int, n: int) -> None:
    machine = Machine()
    machine.add(1, long)
    for id in range(2, 200):
        if id % 2 == 0:
            for copy in range(n):
                machine.add(1000 * copy + id, short, max_tokens=1)
        machine.step()
        if 1 in machine.first:
            break
    assert machine.first[1] <= 2 * -(-long // (2048 - 64)) + 1


@given(st.lists(st.integers(1, 40_000), min_size=1, max_size=12), st.integers(1, 20))
def test_a_sequence_that_decodes_draws_in_every_step(prompts: list[int], tokens: int) -> None:
    machine = Machine()
    machine.add(1, 10, max_tokens=tokens)
    machine.step()
    for id, prompt in enumerate(prompts, 2):
        machine.add(id, prompt)
    machine.step(tokens)
    assert machine.drawn[1] == list(range(1, tokens + 1))


@given(st.integers(2, 40), st.integers(1, 3), st.integers(0, 10))
def test_the_first_in_line_waits_for_room_and_not_for_ever(place: int, short: int, tokens: int) -> None:
    """However many short ones come, it runs once what it waited for is done, and what went before it."""
    machine = Machine(blocks=place + 4)
    machine.add(1, 4 * 16, max_tokens=tokens + 1)
    machine.step()
    machine.add(2, place * 16 + 1, max_tokens=1)
    for id in range(3, 400):
        machine.add(id, short * 16, max_tokens=2)
        machine.step()
        if 2 in machine.first:
            break
    assert machine.first[2] <= 4 + tokens + 2 * (place + 5)
    if place >= 8 and tokens >= 4:
        assert 3 in machine.first
        assert machine.first[3] <= 3


def test_of_prompts_of_one_length_the_first_is_first() -> None:
    machine = Machine(budget=1000)
    for id in (1, 2, 3):
        machine.add(id, 5000, max_tokens=1)
    machine.step(15)
    assert [machine.first[id] for id in (1, 2, 3)] == [5, 10, 15]
