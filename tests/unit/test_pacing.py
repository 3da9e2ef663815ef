"""How much of a prompt goes beside sequences that decode. Times are those of a machine that is made up here."""

from __future__ import annotations

import pytest
from tests.support.ranks import piece

from lockstep_runtime.engine.pacing import FIRST_TOKENS, LEAST_TOKENS, SLOWDOWN, Pace
from lockstep_runtime.protocol.step import SequenceSlice

DECODE = [piece(1, 40, [7], [0]), piece(2, 50, [7], [1])]


def with_prompt(tokens: int) -> list[SequenceSlice]:
    return [*DECODE, piece(3, 0, [5] * tokens, [2])]


def learned(decode: float, each: float, chunk: int = 100) -> Pace:
    pace = Pace()
    for _ in range(30):
        pace.learn(DECODE, decode)
        pace.learn(with_prompt(chunk), decode + chunk * each)
    return pace


@pytest.mark.parametrize(("decode", "each"), [(0.030, 0.0007), (0.020, 0.00002), (0.030, 0.0001)])
def test_a_chunk_makes_a_step_so_much_longer(decode: float, each: float) -> None:
    tokens = learned(decode, each).prefill_tokens()
    assert tokens is not None
    assert (decode + tokens * each) / decode == pytest.approx(SLOWDOWN, rel=0.05)


def test_a_prompt_ends_however_slow_the_machine_is() -> None:
    assert learned(0.001, 0.1).prefill_tokens() == LEAST_TOKENS


def test_nothing_is_held_back_before_a_sequence_has_decoded_by_itself() -> None:
    pace = Pace()
    pace.learn(with_prompt(100), 1.0)
    assert pace.prefill_tokens() is None
    pace.learn(DECODE, 0.1)
    assert pace.prefill_tokens() == LEAST_TOKENS


def test_the_first_chunk_beside_others_is_small() -> None:
    pace = Pace()
    pace.learn(DECODE, 0.1)
    assert pace.prefill_tokens() == FIRST_TOKENS


def test_prompts_that_cost_nothing_are_not_held_back() -> None:
    pace = Pace()
    pace.learn(DECODE, 0.1)
    pace.learn(with_prompt(10), 0.1)
    assert pace.prefill_tokens() is None


def test_one_step_that_was_held_up_by_something_else_changes_little() -> None:
    pace = learned(0.030, 0.0007)
    before = pace.prefill_tokens()
    pace.learn(with_prompt(100), 30.0)
    pace.learn(DECODE, 30.0)
    after = pace.prefill_tokens()
    assert before is not None
    assert after is not None
    assert before / 2 < after < before * 2


def test_a_machine_that_becomes_slower_is_followed() -> None:
    pace = learned(0.030, 0.0001)
    for _ in range(60):
        pace.learn(with_prompt(100), 0.030 + 100 * 0.001)
    tokens = pace.prefill_tokens()
    assert tokens == pytest.approx((SLOWDOWN - 1) * 0.030 / 0.001, rel=0.1)
