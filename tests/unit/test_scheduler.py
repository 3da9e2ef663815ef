"""The scheduler's rules, one by one. Whole random lives are in tests/sim."""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Any

from lockstep_runtime.engine.client import FinishReason, GenerationRequest
from lockstep_runtime.engine.scheduler import SampledOutput, Scheduler
from lockstep_runtime.engine.sequence import QUARANTINE_AT, Sequence
from lockstep_runtime.protocol.step import (
    LogitRules,
    Past,
    Ruled,
    SampledToken,
    SamplingParams,
    SequenceSlice,
    StateSlots,
)


def scheduler(
    *, max_sequences: int = 8, max_batch_tokens: int = 16, blocks: int = 16, max_model_len: int = 1000
) -> Scheduler:
    return Scheduler(
        max_sequences=max_sequences,
        max_batch_tokens=max_batch_tokens,
        max_model_len=max_model_len,
        blocks=blocks,
        block_size=4,
    )


def sequence(number: int, prompt: int, max_tokens: int = 8, stop: frozenset[int] = frozenset()) -> Sequence:
    request = GenerationRequest(
        request_id=str(number),
        prompt=tuple(range(1000 * number, 1000 * number + prompt)),  # no two begin alike
        max_tokens=max_tokens,
        sampling=SamplingParams(temperature=0),
        stop_token_ids=stop,
    )
    return Sequence(number, request)


def step(planner: Scheduler, token: int = 7) -> tuple[list[SequenceSlice], list[SampledOutput]]:
    slices = planner.plan()
    sampled = [SampledToken(sequence_id=part.sequence_id, token=token) for part in slices if part.sample]
    return slices, planner.apply(slices, sampled)


def shape(slices: Many[SequenceSlice]) -> list[tuple[int, int, int, bool]]:
    return [(part.sequence_id, part.position, len(part.tokens), part.sample is not None) for part in slices]


def test_nothing_to_do_is_an_empty_plan() -> None:
    assert scheduler().plan() == []


def test_a_long_prompt_is_prefilled_in_chunks_and_drawn_from_at_its_end_only() -> None:
    planner = scheduler()
    planner.add(sequence(1, prompt=40))
    assert shape(step(planner)[0]) == [(1, 0, 16, False)]
    assert shape(step(planner)[0]) == [(1, 16, 16, False)]
    assert shape(step(planner)[0]) == [(1, 32, 8, True)]
    slices, _ = step(planner)
    assert shape(slices) == [(1, 40, 1, True)]
    assert slices[0].tokens == [7]


def test_prefill_shares_the_step_with_decodes_and_leaves_them_room() -> None:
    planner = scheduler()
    planner.add(sequence(1, prompt=3))
    step(planner)
    planner.add(sequence(2, prompt=30))
    assert shape(step(planner)[0]) == [(1, 3, 1, True), (2, 0, 15, False)]
    assert shape(step(planner)[0]) == [(1, 4, 1, True), (2, 15, 15, True)]


def test_an_older_prefill_does_not_starve_a_later_decode() -> None:
    planner = scheduler(max_batch_tokens=4, blocks=64)
    planner.add(sequence(1, prompt=3))
    planner.add(sequence(2, prompt=1))
    step(planner)
    planner.start_over(max_model_len=1000, blocks=64, block_size=4)
    planner.add(sequence(3, prompt=1))
    for _ in range(6):
        slices = step(planner)[0]
        assert sum(len(part.tokens) for part in slices) <= 4
    assert {part.sequence_id for part in slices} == {1, 2, 3}


def test_the_first_in_line_is_overtaken_by_no_more_than_would_fill_its_place() -> None:
    planner = scheduler(blocks=8, max_sequences=20)
    planner.add(sequence(1, prompt=12, max_tokens=1))
    planner.add(sequence(2, prompt=30, max_tokens=2))  # lacks room: eight blocks, and five are free
    for number in range(3, 20):
        planner.add(sequence(number, prompt=4, max_tokens=1))
    order = []
    while slices := step(planner)[0]:
        order += [part.sequence_id for part in slices if part.position == 0]
    assert sorted(order) == list(range(1, 20))
    assert order.index(2) == 1 + 8


def test_who_lacks_room_himself_overtakes_nobody() -> None:
    planner = scheduler(blocks=8)
    planner.add(sequence(1, prompt=12, max_tokens=1))
    planner.add(sequence(2, prompt=30, max_tokens=2))
    planner.add(sequence(3, prompt=24, max_tokens=1))
    assert shape(planner.plan()) == [(1, 0, 12, True)]


def test_no_more_than_max_sequences_run() -> None:
    planner = scheduler(max_sequences=2)
    for number in range(1, 5):
        planner.add(sequence(number, prompt=1))
    step(planner)
    assert (planner.running, planner.waiting) == (2, 2)


def test_when_blocks_run_out_the_latest_is_computed_again_and_both_finish() -> None:
    planner = scheduler(blocks=4)  # 16 tokens
    planner.add(sequence(1, prompt=7, max_tokens=9))
    planner.add(sequence(2, prompt=7, max_tokens=9))
    finished: list[int] = []
    positions: dict[int, list[int]] = {1: [], 2: []}
    for _ in range(40):
        slices, drawn = step(planner)
        for part in slices:
            positions[part.sequence_id].append(part.position)
        finished += [one.sequence_id for one in drawn if one.finish]
    assert finished == [1, 2]
    assert planner.preemptions >= 1
    assert positions[1] == sorted(positions[1])  # the oldest never went back
    assert positions[2].count(0) == 2
    assert planner.book.free == 4


def test_a_stop_token_ends_a_sequence_and_is_delivered() -> None:
    planner = scheduler()
    planner.add(sequence(1, prompt=1, stop=frozenset({7})))
    _, drawn = step(planner)
    assert [(one.token.token, one.finish) for one in drawn] == [(7, FinishReason.STOP)]
    assert planner.plan() == []


def test_max_tokens_and_the_models_length_end_a_sequence() -> None:
    planner = scheduler(max_model_len=5)
    planner.add(sequence(1, prompt=1, max_tokens=2))
    planner.add(sequence(2, prompt=3, max_tokens=2))
    step(planner)
    _, drawn = step(planner)
    assert [one.finish for one in drawn] == [FinishReason.LENGTH] * 2


def test_what_can_run_by_itself_is_bounded_by_the_cache_and_the_model() -> None:
    planner = scheduler(blocks=4, max_model_len=12)
    assert planner.fits(12)
    assert not planner.fits(13)
    assert scheduler(blocks=4).max_model_len == 16


def test_a_sequence_cancelled_in_mid_step_draws_nothing_and_frees_its_blocks() -> None:
    planner = scheduler()
    planner.add(sequence(1, prompt=5))
    slices = planner.plan()
    planner.remove(1)
    assert planner.book.used == 0
    assert planner.apply(slices, [SampledToken(sequence_id=1, token=3)]) == []


def test_starting_over_feeds_every_token_again() -> None:
    planner = scheduler()
    planner.add(sequence(1, prompt=5))
    step(planner)
    step(planner)
    assert planner.start_over(max_model_len=1000, blocks=16, block_size=4) == []
    slices, _ = step(planner)
    assert shape(slices) == [(1, 0, 7, True)]
    assert slices[0].tokens == [*range(1000, 1005), 7, 7]


def test_starting_over_with_a_smaller_cache_gives_back_what_no_longer_fits() -> None:
    planner = scheduler()
    planner.add(sequence(1, prompt=20))
    planner.add(sequence(2, prompt=2, max_tokens=2))
    lost = planner.start_over(max_model_len=1000, blocks=2, block_size=4)
    assert [one.id for one in lost] == [1]
    assert shape(planner.plan()) == [(2, 0, 2, True)]


def test_after_a_fault_suspects_run_alone_until_they_draw() -> None:
    planner = scheduler()
    for number in (1, 2, 3):
        planner.add(sequence(number, prompt=4))
    slices = planner.plan()
    assert planner.fault_points(slices, 2) == []
    planner.start_over(max_model_len=1000, blocks=16, block_size=4)
    for number in (1, 2, 3):
        assert shape(step(planner)[0]) == [(number, 0, 4, True)]
    assert [part.sequence_id for part in planner.plan()] == [1, 2, 3]


def test_a_sequence_that_fails_again_alone_is_given_up_and_no_other() -> None:
    planner = scheduler()
    for number in (1, 2):
        planner.add(sequence(number, prompt=4))
    planner.fault_points(planner.plan(), 2)
    planner.start_over(max_model_len=1000, blocks=16, block_size=4)
    alone = planner.plan()
    assert [one.id for one in planner.fault_points(alone, 2)] == [1]
    planner.start_over(max_model_len=1000, blocks=16, block_size=4)
    assert [part.sequence_id for part in step(planner)[0]] == [2]
    assert planner.waiting == 0


def test_lost_processes_are_held_against_nobody_too_soon() -> None:
    planner = scheduler()
    planner.add(sequence(1, prompt=4))
    for _ in range(3):
        assert planner.fault_points(planner.plan(), 1) == []
        planner.start_over(max_model_len=1000, blocks=16, block_size=4)
    assert [one.id for one in planner.fault_points(planner.plan(), 1)] == [1]


def test_a_suspect_takes_blocks_from_the_others_when_it_must() -> None:
    planner = scheduler(blocks=4)
    planner.add(sequence(1, prompt=4, max_tokens=8))
    planner.add(sequence(2, prompt=12, max_tokens=4))
    planner.fault_points(planner.plan(), 2)
    planner.remove(1)
    planner.add(sequence(0, prompt=4, max_tokens=8))
    planner.fault_points([SequenceSlice(sequence_id=0, position=0, tokens=[], blocks=[])], 2)
    planner.start_over(max_model_len=1000, blocks=4, block_size=4)
    assert shape(step(planner)[0]) == [(0, 0, 4, True)]
    assert shape(step(planner)[0]) == [(2, 0, 12, True)]


def test_no_sequence_is_admitted_into_the_room_that_a_running_prefill_still_needs() -> None:
    planner = scheduler(blocks=16)
    planner.add(sequence(1, prompt=40))  # ten blocks, of which the first step takes four
    step(planner)
    planner.add(sequence(2, prompt=32))  # eight: twelve are free, and six of them promised
    assert {part.sequence_id for part in step(planner)[0]} == {1}
    assert planner.preemptions == 0


def test_a_prompts_scores_of_a_request_that_was_cancelled_meanwhile_are_dropped() -> None:
    planner = scheduler()
    planner.add(sequence(1, prompt=4))
    slices = planner.plan()
    planner.remove(1)
    scored = [SampledToken(sequence_id=1, token=3)]
    assert planner.apply(slices, [SampledToken(sequence_id=1, token=7)], scored) == []


def test_the_past_goes_with_the_first_draw_and_again_where_rank_0_has_forgotten_it() -> None:
    planner = with_states(9)
    rules = LogitRules(presence_penalty=1.0)
    request = GenerationRequest(
        request_id="1", prompt=tuple(range(20)), max_tokens=8, sampling=SamplingParams(temperature=0), rules=rules
    )
    planner.add(Sequence(1, request))
    planner.add(sequence(2, prompt=3))
    told: list[Ruled | None] = []
    for _ in range(4):  # a prefill of two chunks, and two draws more
        slices, _ = step(planner)
        told += [part.ruled for part in slices if part.sequence_id == 1]
        assert [part.ruled for part in slices if part.sequence_id == 2] == [None]
    first = Ruled(drawn=0, past=Past(rules=rules, start=20, tokens=[]))
    assert told == [None, first, Ruled(drawn=1), Ruled(drawn=2)]
    slices = planner.plan()
    of_the_other = [SampledToken(sequence_id=2, token=7)]
    assert [one.sequence_id for one in planner.apply(slices, of_the_other, put_off=[1])] == [2]
    again, _ = step(planner)
    [before], [now] = ([part for part in parts if part.sequence_id == 1] for parts in (slices, again))
    assert now.ruled == Ruled(drawn=3, past=Past(rules=rules, start=20, tokens=[7, 7]))
    assert (now.position, now.tokens, now.state) == (before.position, before.tokens, before.state)
    assert next(part for part in step(planner)[0] if part.sequence_id == 1).ruled == Ruled(drawn=4)


def test_what_was_put_off_is_not_scored_twice() -> None:
    planner = scheduler()
    scored = SamplingParams(temperature=0, prompt_logprobs=0)
    request = GenerationRequest(request_id="1", prompt=(1, 2, 3), max_tokens=2, sampling=scored)
    planner.add(Sequence(1, request))
    slices = planner.plan()
    scores = [SampledToken(sequence_id=1, token=token, logprob=-1.0) for token in (2, 3)]
    assert planner.apply(slices, [], scores, put_off=[1]) == []
    [drawn] = planner.apply(planner.plan(), [SampledToken(sequence_id=1, token=7)], scores)
    assert [token.token for token in drawn.prompt] == [2, 3]


def test_a_suspect_that_runs_alone_takes_the_room_that_it_needs() -> None:
    planner = scheduler(blocks=4)
    suspect, other = sequence(1, prompt=4), sequence(2, prompt=8)
    planner.add(suspect)
    planner.add(other)
    step(planner)
    while planner.preemptions == 0:
        suspect.fault_points = QUARANTINE_AT  # which every token takes back
        slices, drawn = step(planner)
        assert [part.sequence_id for part in slices] == [1]
        assert drawn
    assert planner.preemptions == 1


def with_states(slots: int, **more: Any) -> Scheduler:
    return Scheduler(
        max_sequences=8, max_batch_tokens=16, max_model_len=1000, blocks=16, block_size=4, state_slots=slots,
        prefix_caching=False, **more,
    )  # fmt: skip


def test_each_sequence_has_two_state_slots_and_the_rest_waits_for_them() -> None:
    planner = with_states(5)
    for number in (1, 2, 3):
        planner.add(sequence(number, prompt=2, max_tokens=2))
    first = planner.plan()
    assert [(part.sequence_id, part.state.read) for part in first] == [(1, 0), (2, 0)]
    assert planner.plan() == first, "a step that failed is planned again as it was"
    planner.apply(first, [SampledToken(sequence_id=part.sequence_id, token=7) for part in first])
    assert [one.state.read for one in planner.held()] == [part.state.write for part in first]
    second, done = step(planner)
    assert [part.state.read for part in second] == [part.state.write for part in first]
    assert {one.sequence_id for one in done if one.finish} == {1, 2}
    third, _ = step(planner)
    assert [(part.sequence_id, part.state.read) for part in third] == [(3, 0)]


def test_one_that_gives_up_its_blocks_begins_with_zeros_again() -> None:
    planner = with_states(9)
    planner.add(sequence(1, prompt=30, max_tokens=20))
    planner.add(sequence(2, prompt=28, max_tokens=20))
    while not planner.preemptions:
        step(planner)
    again = next(part for _ in range(100) for part in step(planner)[0] if part.sequence_id == 2)
    assert (again.position, again.state.read) == (0, 0)


def test_a_suspect_runs_alone_with_a_state_though_all_are_taken() -> None:
    planner = with_states(3)
    planner.add(sequence(1, prompt=2, max_tokens=9))
    step(planner)
    planner.add(sequence(2, prompt=2))
    planner.fault_points([SequenceSlice(sequence_id=2, position=0, tokens=[], blocks=[])], QUARANTINE_AT)
    slices, _ = step(planner)
    assert [(part.sequence_id, part.state.read) for part in slices] == [(2, 0)]


def test_new_caches_have_new_states() -> None:
    planner = with_states(5)
    planner.add(sequence(1, prompt=2))
    step(planner)
    planner.start_over(max_model_len=1000, blocks=16, block_size=4, state_slots=3)
    assert [(part.position, part.state) for part in planner.plan()] == [(0, StateSlots(0, 1))]


def test_a_prompt_goes_in_small_chunks_beside_one_that_decodes() -> None:
    planner = scheduler(blocks=64)
    planner.add(sequence(1, prompt=3))
    step(planner)
    planner.add(sequence(2, prompt=20))
    assert shape(planner.plan(prefill_tokens=5)) == [(1, 3, 1, True), (2, 0, 5, False)]
    assert shape(planner.plan(prefill_tokens=500)) == [(1, 3, 1, True), (2, 0, 15, False)]
    assert shape(planner.plan()) == [(1, 3, 1, True), (2, 0, 15, False)]


def test_without_one_that_decodes_nothing_is_held_back() -> None:
    planner = scheduler(blocks=64)
    planner.add(sequence(1, prompt=30))
    assert shape(planner.plan(prefill_tokens=5)) == [(1, 0, 16, False)]


def test_every_sequence_moves_however_small_the_chunk_is() -> None:
    planner = scheduler(blocks=64)
    planner.add(sequence(1, prompt=1))
    step(planner)
    for number in (2, 3, 4):
        planner.add(sequence(number, prompt=9))
    slices = planner.plan(prefill_tokens=1)
    assert shape(slices)[0] == (1, 1, 1, True)
    assert sum(len(part.tokens) for part in slices) == 4


def test_a_stream_that_is_computed_again_is_not_held_back() -> None:
    planner = scheduler(blocks=64)
    planner.add(sequence(1, prompt=12, max_tokens=20))
    step(planner)
    step(planner)
    planner.start_over(max_model_len=1000, blocks=64, block_size=4)
    planner.add(sequence(2, prompt=1))
    slices = planner.plan(prefill_tokens=2)
    assert (2, 0, 1, True) in shape(slices), "it decodes"
    assert (1, 0, 14, True) in shape(slices)
