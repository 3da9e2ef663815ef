"""What the scheduler shares between sequences that begin alike, of a model with recurrent states."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.test_scheduler_prefix import asked, begun, scheduler, step

from lockstep_runtime.engine.contexts import EVERY, WORTHWHILE, stops
from lockstep_runtime.engine.scheduler import Scheduler
from lockstep_runtime.engine.sequence import Sequence

PROMPT = tuple(range(30))  # seven blocks of 4, and two tokens


def chunks(planner: Scheduler, sequence: Sequence) -> list[tuple[int, int]]:
    """Where each step of its prompt begins, and how many tokens it has."""
    found = [begun(planner, sequence)]
    while sum(found[-1]) < len(sequence.request.prompt):
        part = next(part for part in step(planner)[0] if part.sequence_id == sequence.id)
        found.append((part.position, len(part.tokens)))
    return found


def test_a_prompt_is_cut_at_its_last_whole_block_and_found_from_there() -> None:
    planner = scheduler(blocks=64, state_slots=17)
    assert chunks(planner, asked(1, PROMPT)) == [(0, 28), (28, 2)]
    again = asked(2, PROMPT)
    assert chunks(planner, again) == [(28, 2)]
    assert again.cached == 28
    assert chunks(planner, asked(3, (*PROMPT, 51, 52, 53))) == [(28, 5)]
    assert (planner.looked_up_tokens, planner.cached_tokens) == (30 + 30 + 33, 28 + 28)


def test_where_two_prompts_part_a_third_begins() -> None:
    planner = scheduler(blocks=64, state_slots=17)
    chunks(planner, asked(1, PROMPT))
    assert chunks(planner, asked(2, (*PROMPT[:22], *range(60, 80)))) == [(0, 20), (20, 20), (40, 2)]
    assert chunks(planner, asked(3, (*PROMPT[:22], *range(80, 90)))) == [(20, 12)]


def test_a_short_prompt_is_not_cut_and_a_conversations_next_turn_begins_behind_the_answer() -> None:
    planner = scheduler(blocks=64, state_slots=17)
    assert chunks(planner, asked(1, PROMPT[:15])) == [(0, 15)]
    for _ in range(7):
        slices, _ = step(planner)
    assert slices[0].position == 21  # the 22nd token is computed, the last one drawn is not
    assert chunks(planner, asked(2, (*PROMPT[:15], *[7] * 8, 1, 2, 3))) == [(20, 6)]


def test_of_what_was_passed_only_the_end_is_kept() -> None:
    planner = scheduler(blocks=64, state_slots=17)
    chunks(planner, asked(1, PROMPT[:15]))
    for _ in range(7):
        step(planner)
    assert chunks(planner, asked(2, (*PROMPT[:15], 7, 9, 9)))[0][0] == 0


@pytest.mark.parametrize("salt", ["", "b"])
def test_who_has_another_salt_shares_nothing(salt: str) -> None:
    planner = scheduler(blocks=64, state_slots=17)
    chunks(planner, asked(1, PROMPT, "a"))
    assert begun(planner, asked(2, PROMPT, salt))[0] == 0
    assert begun(planner, asked(3, PROMPT, "a"))[0] == 28


def test_a_state_whose_blocks_are_gone_is_of_no_use() -> None:
    planner = scheduler(blocks=16, state_slots=17)
    chunks(planner, asked(1, PROMPT))
    planner.remove(1)
    chunks(planner, asked(2, tuple(range(100, 160))))  # takes fifteen of the sixteen blocks
    planner.remove(2)
    assert begun(planner, asked(3, PROMPT))[0] == 0


def test_blocks_whose_state_is_gone_are_computed_again() -> None:
    planner = scheduler(blocks=64, state_slots=3)  # one pair
    chunks(planner, asked(1, PROMPT))
    planner.remove(1)
    assert begun(planner, asked(2, PROMPT[:9]))[0] == 0
    planner.remove(2)
    for number in (3, 4):
        begun(planner, asked(number, (50 + number,)))
        step(planner)
        planner.remove(number)
    assert begun(planner, asked(5, PROMPT))[0] == 0


def test_who_gave_up_its_blocks_goes_on_from_its_last_state() -> None:
    planner = scheduler(blocks=14, state_slots=17)
    chunks(planner, asked(1, PROMPT[:15]))
    begun(planner, asked(2, tuple(range(100, 130))))
    while not planner.preemptions:
        step(planner)
    again = next(part for _ in range(9) for part in step(planner)[0] if part.sequence_id == 2)
    assert again.position >= 28


def test_what_was_found_is_not_relied_on_after_a_look_at_what_is_in_use() -> None:
    planner = scheduler(blocks=64, state_slots=17)
    chunks(planner, asked(1, PROMPT))
    planner.remove(1)
    planner.forget_cached()
    assert begun(planner, asked(2, PROMPT))[0] == 0


def test_new_caches_hold_nothing_and_without_caching_nothing_is_cut() -> None:
    planner = scheduler(blocks=64, state_slots=17)
    chunks(planner, asked(1, PROMPT))
    planner.remove(1)
    planner.start_over(max_model_len=1000, blocks=64, block_size=4, state_slots=17)
    assert begun(planner, asked(2, PROMPT))[0] == 0
    plain = scheduler(blocks=64, state_slots=17, prefix_caching=False)
    assert chunks(plain, asked(1, PROMPT)) == [(0, 30)]
    assert begun(plain, asked(2, PROMPT)) == (0, 30)


def test_long_prompts_are_cut_into_parts_and_nothing_is_cut_for_little() -> None:
    assert stops(0, 0, WORTHWHILE - 1) == []
    assert stops(0, 0, WORTHWHILE) == [WORTHWHILE]
    assert stops(0, 0, 2 * EVERY + WORTHWHILE - 1) == [EVERY, 2 * EVERY]
    assert stops(3, 12, 14) == [12]
    assert stops(3, 12, 40) == [12, 32, 40]
    assert stops(EVERY, EVERY, 2 * EVERY) == [2 * EVERY]


@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 200))
def test_stops_rise_behind_what_is_known(begun: int, more: int, rest: int) -> None:
    known, whole = begun + more, begun + more + rest
    found = stops(begun, known, whole)
    assert found == sorted(set(found))
    assert all(begun < stop <= whole for stop in found)
    assert all(later - sooner <= EVERY for sooner, later in zip([begun, *found], [*found, whole], strict=True))
