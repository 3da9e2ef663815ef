"""How many blocks all ranks get: as at first, less only when a rank has had no room for long."""

from __future__ import annotations

from lockstep_runtime.recovery.cache_plan import CachePlan
from lockstep_runtime.recovery.timing import ROOM_LOOK_SECONDS, ROOM_SECONDS

NOW = 1000.0


def plan(*offers: int, state_slots: int = 8) -> CachePlan:
    chosen = CachePlan()
    chosen.choose(offers, state_slots, NOW)
    return chosen


def test_nothing_is_known_before_the_first_choice() -> None:
    assert (CachePlan().blocks, CachePlan().state_slots) == (0, 0)
    assert CachePlan().retry_at({0: 5}, -1.0) is None  # nobody is short of nothing


def test_the_smallest_offer_is_everybodys_and_stays_what_is_wanted() -> None:
    chosen = plan(90, 64, 70)
    assert (chosen.blocks, chosen.state_slots) == (64, 8)
    chosen.choose([100, 100], 99, NOW + 1)
    assert (chosen.blocks, chosen.state_slots) == (64, 8), "as at the first time"


def test_a_rank_with_less_for_a_while_is_asked_again_and_then_all_get_what_it_has() -> None:
    chosen = plan(64, 64)
    chosen.choose([64, 40], 8, NOW + 5)
    assert chosen.blocks == 64, "not yet"
    answers = {0: 64, 1: 40, 2: 50}
    until = NOW + 5 + ROOM_SECONDS
    assert chosen.retry_at(answers, NOW + 5) == NOW + 5 + ROOM_LOOK_SECONDS
    assert chosen.retry_at(answers, until - 0.1) == until - 0.1 + ROOM_LOOK_SECONDS
    assert chosen.blocks == 64
    assert chosen.retry_at(answers, until) == until, "at once, for what it has"
    assert chosen.blocks == 40
    assert chosen.retry_at({0: 64, 1: 40, 2: 50}, until) is None
    assert chosen.retry_at({0: 40, 1: 39, 2: 40}, until + ROOM_SECONDS - 0.1) == until + ROOM_SECONDS - 0.1 + 1.0
    assert chosen.retry_at({0: 40, 1: 39, 2: 40}, until + ROOM_SECONDS + 3) == until + ROOM_SECONDS + 3
    assert chosen.blocks == 39


def test_a_rank_with_more_than_it_needs_is_not_short() -> None:
    chosen = plan(64, 64)
    assert chosen.retry_at({0: 65, 1: 64}, NOW + 1000) is None
    assert chosen.blocks == 64


def test_the_full_number_comes_back_with_the_room() -> None:
    chosen = plan(64, 64)
    assert chosen.retry_at({0: 64, 1: 40}, NOW + ROOM_SECONDS) is not None
    chosen.choose([63, 80], 8, NOW + 20)
    assert chosen.blocks == 40, "only when all have it"
    chosen.choose([70, 80], 8, NOW + 30)
    assert chosen.blocks == 64


def test_what_was_agreed_can_be_forgotten() -> None:
    chosen = plan(64, 64)
    chosen.forget()
    assert chosen.blocks == 0
    chosen.choose([30, 40], 4, NOW + 1)
    assert (chosen.blocks, chosen.state_slots) == (30, 4)
    chosen.choose([64, 64], 8, NOW + 2)
    assert chosen.blocks == 30
