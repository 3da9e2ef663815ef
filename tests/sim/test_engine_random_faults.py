"""Random faults at random times on groups of one to three ranks, in virtual time; a failing seed is named.

`LOCKSTEP_SIM_SCHEDULES` says how many schedules are run, `LOCKSTEP_SIM_FIRST` the first one's seed.
"""

from __future__ import annotations

import logging
import os
from typing import Final

import pytest
from tests.support.sim_world import World
from tests.support.virtual_loop import run_virtually

SCHEDULES: Final = int(os.environ.get("LOCKSTEP_SIM_SCHEDULES", "1000"))
FIRST: Final = int(os.environ.get("LOCKSTEP_SIM_FIRST", "0"))
CHUNK: Final = 100


def play(seed: int) -> World:
    world = World(seed)
    try:
        run_virtually(world.run())
    except Exception as error:
        raise AssertionError(f"seed {seed}, {world.size} ranks: {error}") from error
    return world


@pytest.mark.parametrize("first", range(FIRST, FIRST + SCHEDULES, CHUNK))
def test_random_fault_schedules_lose_no_token_and_come_to_rest(first: int) -> None:
    seeds = range(first, min(first + CHUNK, FIRST + SCHEDULES))
    print(f"seeds {seeds.start} to {seeds.stop - 1}")
    logging.disable(logging.CRITICAL)
    try:
        worlds = [play(seed) for seed in seeds]
    finally:
        logging.disable(logging.NOTSET)
    recoveries = sum(world.engine.status().recoveries for world in worlds)
    given_up = sum(world.failed for world in worlds)
    found = [world.engine.stats().prefix_cache_hits_total for world in worlds if world.state_slots]
    assert sum(found) > len(worlds), "what these prompts begin with hardly ever has a state"
    assert recoveries > len(worlds) // 2, "these schedules hardly ever break anything"
    assert given_up < len(worlds), f"{given_up} requests were given up in {len(worlds)} schedules"
