"""How long is waited, of what, and what the user's own limit overrides."""

from __future__ import annotations

import msgspec
import pytest

from lockstep_runtime.config import ServeConfig, Watchdog
from lockstep_runtime.recovery.timing import (
    ALLOCATE,
    FIRST_SECONDS,
    HOST,
    LOADING_SECONDS,
    NCCL,
    POISONED_SECONDS,
    RELOADING_SECONDS,
    RENDEZVOUS,
    RETRY_SECONDS,
    SCRUB,
    STUCK_SECONDS,
    Backend,
    Timing,
    timing_of,
)

TIMING = Timing(HOST, None)


def config(backend: str, device: str, step_timeout: float | None = None) -> ServeConfig:
    found = {"model": "m", "served_name": "m", "backend": backend, "device": device}
    return msgspec.convert({**found, "watchdog": Watchdog(step_timeout=step_timeout)}, ServeConfig)


@pytest.mark.parametrize(
    ("backend", "device", "expected"),
    [
        ("auto", "cpu", HOST),
        ("auto", "cuda", NCCL),
        ("nccl", "cuda", NCCL),
        ("nccl", "cpu", NCCL),  # which is refused elsewhere, in its own words
        ("cpu", "cpu", HOST),
        ("cpu", "cuda", HOST),
    ],
)
def test_the_collectives_decide_how_long_joining_and_leaving_them_takes(
    backend: str, device: str, expected: Backend
) -> None:
    assert timing_of(config(backend, device)) == Timing(expected, None)


def test_a_users_limit_of_a_step_is_one_of_loading_without_progress_too() -> None:
    timing = timing_of(config("auto", "cpu", 7.0))
    assert timing.step_timeout == 7.0
    assert timing.loading(1000.0, has_served=True) == timing.loading(0.0, has_served=False) == 7.0


def test_only_joining_is_extended_while_a_rank_gets_further() -> None:
    """A rank that meets, allocates or compares says nothing in between."""
    assert [one.extends for one in (HOST.join, NCCL.join)] == [True, True]
    assert [one.extends for one in (RENDEZVOUS, ALLOCATE, SCRUB)] == [False, False, False]


def test_loading_again_may_stand_still_for_as_long_as_the_whole_took_twice_within_bounds() -> None:
    shortest, longest = RELOADING_SECONDS
    assert TIMING.loading(1000.0, has_served=False) == LOADING_SECONDS  # nothing is known of it yet
    assert [TIMING.loading(load, has_served=True) for load in (0.0, shortest, longest)] == [
        shortest,
        2 * shortest,
        longest,
    ]


def test_a_ranks_processes_may_get_no_further_for_two_and_a_half_of_their_waits_within_bounds() -> None:
    shortest, longest = STUCK_SECONDS
    assert TIMING.stuck(1000.0, has_served=False) == FIRST_SECONDS
    assert TIMING.stuck(0.0, has_served=True) == shortest
    assert TIMING.stuck(15.0, has_served=True) == 2.5 * 2 * 15.0 > shortest
    assert TIMING.stuck(25.0, has_served=True) == 2.5 * 2 * 25.0 < longest
    assert TIMING.stuck(1000.0, has_served=True) == longest
    assert Timing(HOST, 30.0).stuck(0.0, has_served=True) == 2.5 * 30.0


def test_a_poisoned_group_waits_twice_as_long_each_time_up_to_a_bound() -> None:
    first, most = POISONED_SECONDS
    waits = [TIMING.poisoned(times) for times in range(1, 8)]
    assert waits[:4] == [first, 2 * first, 4 * first, 8 * first]
    assert waits[4:] == [most] * 3
    assert TIMING.poisoned(10_000) == most


def test_attempts_to_form_the_group_wait_longer_up_to_the_last_wait() -> None:
    assert [TIMING.retry(failures) for failures in range(len(RETRY_SECONDS))] == list(RETRY_SECONDS)
    assert RETRY_SECONDS[0] == 0.0  # the first at once
    assert TIMING.retry(10_000) == RETRY_SECONDS[-1]
