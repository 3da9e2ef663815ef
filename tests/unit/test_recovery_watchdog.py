"""The learned deadline: cold steps, sizes, bursts, a slow machine, the engine's own delays, a fixed bound."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep_runtime.config import Watchdog
from lockstep_runtime.protocol.images import Pixels
from lockstep_runtime.protocol.step import SequenceSlice
from lockstep_runtime.recovery.watchdog import (
    CEILING_SECONDS,
    LATE_SECONDS,
    LOOK_SECONDS,
    PIXELS_PER_TOKEN,
    UNKNOWN,
    WARMING_SECONDS,
    Deadline,
    DeadlineModel,
    DeadlineTimer,
    Kind,
    Work,
    _nearest,
    extension,
    work_of,
)

ONE = Work(Kind.DECODE, 1, 100)


def model(**settings: float | None) -> DeadlineModel:
    return DeadlineModel(Watchdog(**settings))  # type: ignore[arg-type] # all of its fields are numbers


def after(*steps: tuple[Work, float]) -> DeadlineModel:
    learned = model()
    for work, seconds in steps:
        learned.learn(work, seconds)
    return learned


def part(position: int, tokens: int) -> SequenceSlice:
    return SequenceSlice(sequence_id=1, position=position, tokens=[7] * tokens, blocks=[0])


def test_a_step_is_decode_only_when_every_sequence_feeds_its_one_token() -> None:
    assert work_of([part(9, 1), part(30, 1)]) == Work(Kind.DECODE, 2, 31)
    assert work_of([part(9, 1), part(64, 36)]) == Work(Kind.PREFILL, 37, 100)
    assert work_of([part(0, 1)]).kind is Kind.PREFILL


def test_images_are_work_of_their_own_by_their_pixels() -> None:
    small, large = (Pixels(digest="", height=side, width=side, data=b"") for side in (64, 128))
    one, both = (work_of([part(0, 10)], images) for images in ([small], [small, large]))
    assert one == Work(Kind.IMAGES, 10 + 64 * 64 // PIXELS_PER_TOKEN, 10)
    assert both.tokens == 10 + (64 * 64 + 128 * 128) // PIXELS_PER_TOKEN
    assert work_of([part(0, 10)], []).kind is Kind.PREFILL


def test_the_first_step_of_a_kind_gets_the_ceiling() -> None:
    learned = after((ONE, 0.01))
    assert learned.deadline(ONE).seconds == 2.0
    cold = learned.deadline(Work(Kind.PREFILL, 10, 10))
    assert cold.seconds == CEILING_SECONDS


def test_the_deadline_is_the_expected_time_times_the_factor_between_floor_and_ceiling() -> None:
    assert after((ONE, 0.01)).deadline(ONE).seconds == 2.0
    assert after((ONE, 1.0)).deadline(ONE).seconds == 5.0
    assert after((ONE, 100.0)).deadline(ONE).seconds == CEILING_SECONDS
    eager = model(floor=0.5, factor=10.0)
    eager.learn(ONE, 0.1)
    assert eager.deadline(ONE).seconds == 1.0


def test_a_fixed_bound_switches_learning_off() -> None:
    fixed = model(step_timeout=7.0)
    assert fixed.deadline(ONE) == Deadline(7.0, 7.0, extends=False)
    fixed.learn(ONE, 0.01)
    assert fixed.deadline(ONE).seconds == 7.0


def test_a_long_prefill_is_expected_by_its_tokens_and_its_context() -> None:
    learned = after((Work(Kind.PREFILL, 100, 100), 0.5))
    assert learned.deadline(Work(Kind.PREFILL, 1000, 1000)).seconds == pytest.approx(CEILING_SECONDS)
    assert learned.deadline(Work(Kind.PREFILL, 1000, 100)).seconds == pytest.approx(25.0)
    assert learned.deadline(Work(Kind.PREFILL, 10, 10)).seconds == pytest.approx(2.5)


def test_a_slow_drift_is_followed_both_ways() -> None:
    learned, seconds = model(), 0.5
    for _ in range(300):
        learned.learn(ONE, seconds)
        seconds *= 1.02
        if seconds * 2 < CEILING_SECONDS / 5:
            assert learned.deadline(ONE).seconds > 2 * seconds
    for _ in range(200):
        learned.learn(ONE, 0.5)
    assert learned.deadline(ONE).seconds == pytest.approx(2.5, rel=0.01)


def test_one_burst_is_forgotten_within_seconds_of_steps() -> None:
    learned = after(*[(ONE, 0.03)] * 20, (ONE, 1.5))
    assert learned.deadline(ONE).seconds > 5.0
    for _ in range(40):
        learned.learn(ONE, 0.03)
    assert learned.deadline(ONE).seconds == 2.0


def test_a_machine_that_got_slow_while_decoding_is_given_time_to_prefill() -> None:
    prefill = Work(Kind.PREFILL, 512, 512)
    learned = after((prefill, 1.0), *[(ONE, 0.02)] * 20)
    quiet = learned.deadline(prefill).seconds
    for _ in range(5):
        learned.learn(ONE, 0.06)
    assert learned.deadline(prefill).seconds > 1.5 * quiet


def test_new_processes_warm_up_in_their_first_step_of_each_kind() -> None:
    learned = after((ONE, 0.01), (Work(Kind.PREFILL, 8, 8), 0.01))
    learned.processes_changed()
    assert learned.deadline(ONE).seconds == WARMING_SECONDS
    learned.learn(ONE, 0.01)
    assert learned.deadline(ONE).seconds == 2.0
    assert learned.deadline(Work(Kind.PREFILL, 8, 8)).seconds == WARMING_SECONDS


@given(st.integers(0, 2**32), st.floats(0.001, 3.0))
def test_no_step_within_thrice_its_usual_time_is_taken_for_a_hang(seed: int, usual: float) -> None:
    chance, learned = random.Random(seed), model()
    for number in range(60):
        seconds = usual * chance.uniform(1.0, 3.0)
        if number:
            assert learned.deadline(ONE).seconds >= min(seconds, CEILING_SECONDS)
        learned.learn(ONE, seconds)


@given(
    st.lists(st.tuples(st.sampled_from(Kind), st.integers(1, 4096), st.integers(1, 32768), st.floats(0, 500)),
             max_size=50),
    st.sampled_from(Kind), st.integers(1, 4096), st.integers(1, 32768),
)  # fmt: skip
def test_a_learned_deadline_is_always_between_floor_and_ceiling(
    steps: list[tuple[Kind, int, int, float]], kind: Kind, tokens: int, context: int
) -> None:
    learned = after(*((Work(kind, tokens, context), seconds) for kind, tokens, context, seconds in steps))
    assert 2.0 <= learned.deadline(Work(kind, tokens, context)).seconds <= CEILING_SECONDS


@given(st.integers(1, 2048), st.integers(1, 2048), st.integers(1, 8192), st.floats(0.01, 1.0))
def test_more_tokens_than_any_step_before_never_mean_less_time(
    tokens: int, more: int, context: int, seconds: float
) -> None:
    learned = after((Work(Kind.PREFILL, tokens, context), seconds))
    small = learned.deadline(Work(Kind.PREFILL, tokens, context)).seconds
    assert learned.deadline(Work(Kind.PREFILL, tokens + more, context)).seconds >= small


def test_patience_runs_out_by_its_own_clock() -> None:
    timer, now = DeadlineTimer(1.0, 0.0), 0.0
    while not timer.is_over:
        now += timer.next_wait()
        timer.elapsed(now)
    assert now == pytest.approx(1.0)
    assert timer.next_wait() == pytest.approx(0.0, abs=1e-9)


def test_time_in_which_the_engine_did_not_run_is_not_held_against_the_ranks() -> None:
    timer, now = DeadlineTimer(1.0, 0.0), 0.0
    for pause in (0.0, 30.0, 0.0, 5.0):
        now += timer.next_wait() + pause
        timer.elapsed(now)
    assert timer.waited == pytest.approx(4 * LOOK_SECONDS)
    assert timer.delayed == pytest.approx(35.0)
    assert not timer.is_over


@given(st.floats(0.05, 5.0), st.lists(st.floats(0.0, 2.0), min_size=1, max_size=100))
def test_patience_never_counts_more_than_it_napped(seconds: float, pauses: list[float]) -> None:
    timer, now, slept, waits = DeadlineTimer(seconds, 0.0), 0.0, 0.0, 0
    for pause in pauses:
        next_wait = timer.next_wait()
        slept, waits = slept + next_wait, waits + 1
        now += next_wait + pause
        timer.elapsed(now)
    assert timer.waited <= slept + waits * LATE_SECONDS + 1e-6
    assert timer.waited + timer.delayed == pytest.approx(now)


def test_a_rank_that_still_moves_is_slow_and_one_that_stands_still_hangs() -> None:
    learned, timer = Deadline(2.0, 120.0, extends=True), DeadlineTimer(2.0, 0.0)
    timer.waited = 2.0
    assert extension(learned, timer, moved_ago=0.25) == pytest.approx(0.75)
    assert extension(learned, timer, moved_ago=1.9) == 0.0
    assert extension(learned, timer, moved_ago=None) == 0.0
    timer.waited = 119.5
    assert extension(learned, timer, moved_ago=0.0) == pytest.approx(0.5)
    timer.waited = 120.0
    assert extension(learned, timer, moved_ago=0.0) == 0.0
    fixed = Deadline(2.0, 2.0, extends=False)
    assert extension(fixed, DeadlineTimer(2.0, 0.0), moved_ago=0.0) == 0.0


def test_a_deadline_that_was_learned_may_be_extended_and_one_that_is_unknown_may_not() -> None:
    assert after((ONE, 1.0)).deadline(ONE) == Deadline(5.0, CEILING_SECONDS, extends=True)
    assert model().deadline(ONE) == UNKNOWN == Deadline(CEILING_SECONDS, CEILING_SECONDS, extends=False)


def test_the_work_of_nothing_and_of_two_tokens() -> None:
    assert work_of([]) == Work(Kind.DECODE, 1, 1)
    assert work_of([part(9, 2)]) == Work(Kind.PREFILL, 2, 11)


def test_a_size_that_was_not_seen_is_expected_by_the_nearest_that_was() -> None:
    chance = random.Random(0)

    def size() -> tuple[int, int]:
        return chance.randint(1, 14), chance.randint(1, 16)

    for _ in range(200):
        mine, seen = size(), [size() for _ in range(4)]
        best = min(sum(abs(one - other) for one, other in zip(mine, other_, strict=True)) for other_ in seen)
        found = _nearest(mine, seen)
        assert sum(abs(one - other) for one, other in zip(mine, found, strict=True)) == best


def test_more_work_than_was_seen_is_expected_to_take_in_proportion() -> None:
    learned = after((Work(Kind.PREFILL, 100, 100), 0.5))
    for tokens, context in ((250, 100), (100, 250)):
        assert learned.expected(Work(Kind.PREFILL, tokens, context)) == pytest.approx(1.25)


def test_a_high_mark_sinks_slowly() -> None:
    assert after((ONE, 1.0), (ONE, 0.5)).expected(ONE) == pytest.approx(0.95)


def test_a_machine_that_got_slow_is_believed_at_once_and_trusted_again_slowly() -> None:
    learned = after((ONE, 1.0), (ONE, 3.0))
    assert learned.expected(ONE) == pytest.approx(3.0 * 3.0)
    learned.learn(ONE, 3.0)
    assert learned.expected(ONE) == pytest.approx(3.0 * 2.8)
    learned.learn(ONE, 10.0)
    assert learned.expected(ONE) == pytest.approx(10.0 * 10.0 * 2.8 / 8.4)


def test_steps_that_took_no_time_are_no_trouble() -> None:
    assert after((ONE, 0.0), (ONE, 0.0), (ONE, 0.0)).deadline(ONE).seconds == 2.0


@pytest.mark.parametrize(
    ("slept", "counted"),
    [
        (LOOK_SECONDS, LOOK_SECONDS),
        (LOOK_SECONDS + 0.015, LOOK_SECONDS + 0.015),
        (LOOK_SECONDS + LATE_SECONDS, LOOK_SECONDS + LATE_SECONDS),
        (LOOK_SECONDS + 0.03, LOOK_SECONDS),
        (LOOK_SECONDS + 0.9, LOOK_SECONDS),
        (-1.0, 0.0),
    ],
)
def test_a_nap_that_was_a_little_too_long_counts_and_one_that_was_prolonged_does_not(
    slept: float, counted: float
) -> None:
    timer = DeadlineTimer(1.0, 0.0)
    timer.next_wait()
    timer.elapsed(slept)
    assert timer.waited == counted
    assert timer.delayed == pytest.approx(max(0.0, slept) - counted)


def test_what_passed_before_the_first_nap_is_held_against_nobody() -> None:
    timer = DeadlineTimer(1.0, 0.0)
    timer.elapsed(0.5)
    assert (timer.waited, timer.delayed) == (0.0, 0.5)


def test_nobody_naps_beyond_a_deadline_nor_extends_beyond_the_ceiling() -> None:
    timer = DeadlineTimer(0.1, 0.0)
    timer.next_wait()
    timer.elapsed(0.115)
    assert timer.next_wait() == 0.0
    timer.waited = 121.0
    assert extension(Deadline(2.0, 120.0, extends=True), timer, moved_ago=0.0) == 0.0
