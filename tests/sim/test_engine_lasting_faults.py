"""Faults that stay: within minutes the group is Ready, Failed or Poisoned, and it serves again when they are mended.

`LOCKSTEP_SIM_SCHEDULES` says how many schedules are run, `LOCKSTEP_SIM_FIRST` the first one's seed.
"""

from __future__ import annotations

import logging
import os
from typing import Final

import pytest
from tests.support.lasting_world import LastingWorld
from tests.support.sim_world import LASTING
from tests.support.virtual_loop import run_virtually

from lockstep_runtime.protocol.status import GroupState

SCHEDULES: Final = int(os.environ.get("LOCKSTEP_SIM_SCHEDULES", "1000"))
FIRST: Final = int(os.environ.get("LOCKSTEP_SIM_FIRST", "0"))
CHUNK: Final = 50


def hours_of(seed: int) -> float:
    """Longer than anything may take that has a bound; one in twenty long enough for the longest waits between tries."""
    return 0.5 if seed % 20 == 0 else 1 / 6


def play(seed: int, hours: float = 0.0, kinds: tuple[str, ...] = LASTING) -> LastingWorld:
    world = LastingWorld(seed, hours or hours_of(seed), kinds)
    try:
        run_virtually(world.run())
    except Exception as error:
        raise AssertionError(f"seed {seed}, {world.size} ranks, {world.moment}, {world.struck}: {error}") from error
    return world


@pytest.fixture(autouse=True)
def quiet() -> object:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("first", range(FIRST, FIRST + SCHEDULES, CHUNK))
def test_what_stays_broken_is_said_in_time_and_heals_when_it_is_mended(first: int) -> None:
    worlds = [play(seed) for seed in range(first, min(first + CHUNK, FIRST + SCHEDULES))]
    assert {GroupState.POISONED, GroupState.FAILED} <= {state for world in worlds for state in world.states}


@pytest.mark.parametrize(
    "kind", ["hang in loading", "cut off", *(["die in loading", "raise"] if SCHEDULES > 1000 else [])]
)
def test_a_month_of_it_leaves_texts_and_lists_as_they_were_after_a_day(kind: str) -> None:
    world = play(3, hours=30 * 24.0, kinds=(kind,))
    assert world.poisonings > 1000, "it was hardly tried"
