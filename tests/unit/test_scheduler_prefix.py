"""What the scheduler shares between sequences that begin alike."""

from __future__ import annotations

from lockstep_runtime.engine.client import FinishReason, GenerationRequest
from lockstep_runtime.engine.scheduler import SampledOutput, Scheduler
from lockstep_runtime.engine.sequence import Sequence
from lockstep_runtime.protocol.step import SampledToken, SamplingParams, SequenceSlice


def scheduler(*, blocks: int = 16, state_slots: int = 0, prefix_caching: bool = True) -> Scheduler:
    return Scheduler(
        max_sequences=8, max_batch_tokens=64, max_model_len=1000, blocks=blocks, block_size=4,
        state_slots=state_slots, prefix_caching=prefix_caching,
    )  # fmt: skip


def step(planner: Scheduler, token: int = 7) -> tuple[list[SequenceSlice], list[SampledOutput]]:
    slices = planner.plan()
    sampled = [SampledToken(sequence_id=part.sequence_id, token=token) for part in slices if part.sample]
    return slices, planner.apply(slices, sampled)


def asked(number: int, prompt: tuple[int, ...], salt: str = "", *, scored: bool = False) -> Sequence:
    request = GenerationRequest(
        request_id=str(number),
        prompt=prompt,
        max_tokens=8,
        sampling=SamplingParams(temperature=0, prompt_logprobs=0 if scored else -1),
        cache_salt=salt,
    )
    return Sequence(number, request)


def begun(planner: Scheduler, sequence: Sequence) -> tuple[int, int]:
    """Where it begins to compute, and how much of it in the next step."""
    planner.add(sequence)
    part = next(part for part in step(planner)[0] if part.sequence_id == sequence.id)
    return part.position, len(part.tokens)


def test_a_prompt_begins_behind_the_full_blocks_that_were_computed_before() -> None:
    planner = scheduler()
    assert begun(planner, asked(1, tuple(range(18)))) == (0, 18)
    assert begun(planner, asked(2, (*range(14), 99, 98))) == (12, 4)  # while the first runs
    planner.remove(1)
    planner.remove(2)
    assert begun(planner, asked(3, tuple(range(20)))) == (16, 4)  # and when it is gone
    assert (planner.looked_up_tokens, planner.cached_tokens) == (18 + 16 + 20, 12 + 16)
    assert planner.book.used == 5


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    planner = scheduler()
    begun(planner, asked(1, tuple(range(16))))
    assert begun(planner, asked(2, tuple(range(16)))) == (12, 4)
    assert begun(planner, asked(3, (0,))) == (0, 1)


def test_an_answer_is_found_by_the_next_turn() -> None:
    planner = scheduler()
    begun(planner, asked(1, tuple(range(6))))
    for _ in range(7):
        slices, drawn = step(planner)
    assert drawn[0].finish is FinishReason.LENGTH
    assert slices[0].position == 12  # the thirteenth token is computed, the last one drawn is not
    assert begun(planner, asked(2, (*range(6), *[7] * 8, 1, 2, 3))) == (12, 5)


def test_who_has_another_salt_shares_nothing() -> None:
    planner = scheduler()
    begun(planner, asked(1, tuple(range(16)), "a"))
    assert begun(planner, asked(2, tuple(range(16)), "b")) == (0, 16)
    assert begun(planner, asked(3, tuple(range(16)))) == (0, 16)
    assert begun(planner, asked(4, tuple(range(16)), "a")) == (12, 4)


def test_a_prompt_that_is_scored_is_computed_whole_and_found_by_others() -> None:
    planner = scheduler()
    begun(planner, asked(1, tuple(range(16))))
    planner.add(asked(2, tuple(range(16)), scored=True))
    part = planner.plan()[-1]
    assert (part.position, len(part.tokens)) == (0, 16)
    assert part.scoring is not None
    assert part.scoring.targets == [*range(1, 16)]


def test_what_a_step_has_not_been_booked_for_is_shared_with_nobody() -> None:
    planner = scheduler()
    planner.add(asked(1, tuple(range(16))))
    planner.plan()  # fails
    planner.remove(1)
    assert begun(planner, asked(2, tuple(range(16)))) == (0, 16)


def test_who_gave_up_its_blocks_goes_on_behind_those_that_nobody_has_taken() -> None:
    planner = scheduler(blocks=8)
    begun(planner, asked(1, tuple(range(15))))
    begun(planner, asked(2, tuple(range(100, 113))))
    while not planner.preemptions:
        slices, _ = step(planner)
    assert [part.sequence_id for part in slices] == [1]
    while planner.running < 2:
        slices, drawn = step(planner)
        if drawn and drawn[0].finish:
            break
    again = next(part for part in step(planner)[0] if part.sequence_id == 2)
    assert 0 < again.position < 13


def test_shared_blocks_take_no_room_twice() -> None:
    planner = scheduler(blocks=8)
    begun(planner, asked(1, tuple(range(22))))  # six blocks
    assert begun(planner, asked(2, (*range(20), 50, 51))) == (20, 2)  # six, of which five are the first one's
    assert planner.book.used == 7


def test_new_caches_hold_nothing() -> None:
    planner = scheduler()
    begun(planner, asked(1, tuple(range(16))))
    planner.remove(1)
    planner.start_over(max_model_len=1000, blocks=16, block_size=8)
    assert begun(planner, asked(2, tuple(range(16)))) == (0, 16)
    planner.remove(2)
    assert begun(planner, asked(3, tuple(range(16)))) == (8, 8)


def test_prefix_caching_can_be_switched_off() -> None:
    planner = scheduler(prefix_caching=False)
    begun(planner, asked(1, tuple(range(16))))
    assert begun(planner, asked(2, tuple(range(16)))) == (0, 16)
    assert (planner.looked_up_tokens, planner.cached_tokens) == (0, 0)


def test_the_latest_gives_up_its_own_blocks_when_it_needs_one_more() -> None:
    planner = scheduler(blocks=2)
    planner.add(asked(1, (1, 2, 3)))
    planner.add(asked(2, (4, 5, 6, 7)))
    step(planner)
    assert [part.sequence_id for part in step(planner)[0]] == [1]
    assert (planner.preemptions, planner.waiting, planner.book.cached) == (1, 1, 1)
