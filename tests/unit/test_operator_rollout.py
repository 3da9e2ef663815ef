"""Whose turn it is in a rollout, and why."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from tests.support.operator_models import group

from lockstep_operator.decisions.rollout import RolloutStep, plan
from lockstep_operator.decisions.surge import Need
from lockstep_operator.decisions.surge import plan as surge_plan
from lockstep_operator.groups.group import Group
from lockstep_operator.types.model_status import SurgeGroup, SurgeReason
from lockstep_operator.types.spec_blocks import Rollout, parse_rollout


def steps(*groups: Group, most: int = 1) -> list[str]:
    return [str(turn.step) for turn in plan(groups, "new", most)]


def reasons(*groups: Group, most: int = 1) -> list[str]:
    return [turn.reason for turn in plan(groups, "new", most)]


def test_missing_groups_are_all_made_at_once() -> None:
    assert steps(group(0, ""), group(1, "")) == ["Create", "Create"]
    assert reasons(group(0, "")) == ["group 0 doesn't exist yet"]


def test_the_highest_ready_group_goes_first_and_the_others_wait_for_it() -> None:
    groups = (group(0, "old"), group(1, "old"), group(2, "old"))
    assert steps(*groups) == ["Wait", "Wait", "Replace"]
    assert reasons(*groups) == [
        "group 0 keeps revision old until group 2 is Ready",
        "group 1 keeps revision old until group 2 is Ready",
        "group 2 gets revision new: it is next",
    ]


def test_the_next_group_waits_until_the_one_before_is_ready() -> None:
    assert steps(group(0, "old"), group(1, "new", ready=False)) == ["Wait", "Keep"]
    assert steps(group(0, "old"), group(1, "new", pods="old")) == ["Wait", "Keep"]
    assert steps(group(0, "old"), group(1, "new")) == ["Replace", "Keep"]


def test_a_group_that_is_down_goes_first_whatever_its_number() -> None:
    groups = (group(0, "old", ready=False), group(1, "old"))
    assert steps(*groups) == ["Replace", "Wait"]
    assert reasons(*groups)[0] == "group 0 isn't Ready anyway, so it gets revision new first"


def test_a_ready_group_is_not_taken_while_another_is_down() -> None:
    assert steps(group(0, "new", ready=False), group(1, "old"), group(2, "old")) == ["Keep", "Wait", "Wait"]
    assert steps(group(0, ""), group(1, "old")) == ["Create", "Wait"]


def test_a_single_group_is_replaced_though_nothing_is_left_meanwhile() -> None:
    assert steps(group(0, "old")) == ["Replace"]


def test_more_may_be_down_when_the_spec_allows_it() -> None:
    assert steps(group(0, "old"), group(1, "old"), group(2, "old"), most=2) == ["Wait", "Replace", "Replace"]


kinds = st.sampled_from(["", "old", "new", "other"])


@given(st.lists(st.tuples(kinds, st.booleans()), min_size=1, max_size=6), st.integers(1, 3))
def test_never_more_groups_are_down_than_allowed(kinds: list[tuple[str, bool]], most: int) -> None:
    groups = [group(index, revision, ready=ready) for index, (revision, ready) in enumerate(kinds)]
    turns = plan(groups, "new", most)
    taken = [g for g, turn in zip(groups, turns, strict=True) if turn.step is RolloutStep.REPLACE]
    down = sum(not g.ready for g in groups)
    assert down + sum(g.ready for g in taken) <= max(most, down)
    assert [turn.group for turn in turns] == [g.index for g in groups]
    assert all(turn.reason for turn in turns)


@given(st.lists(st.booleans(), min_size=1, max_size=6), st.integers(1, 3))
def test_something_always_moves_unless_a_moved_group_is_waited_for(ready: list[bool], most: int) -> None:
    groups = [group(index, "old", ready=up) for index, up in enumerate(ready)]
    assert any(turn.step is RolloutStep.REPLACE for turn in plan(groups, "new", most))


def test_a_surge_group_that_serves_stands_in_for_one_that_is_replaced() -> None:
    lone = group(0, "old")
    assert [str(turn.step) for turn in plan((lone,), "new", 0)] == ["Wait"]
    assert plan((lone,), "new", 0)[0].reason == "group 0 keeps revision old until one more group is Ready"
    starting = plan((lone, group(1, "new", ready=False)), "new", 0, surge=[1])
    assert [str(turn.step) for turn in starting] == ["Wait", "Keep"]
    standing_in = plan((lone, group(1, "new")), "new", 0, surge=[1])
    assert [str(turn.step) for turn in standing_in] == ["Replace", "Keep"]


def test_a_surge_group_whose_pods_are_about_to_go_stands_in_for_nobody() -> None:
    turns = plan((group(0, "old"), group(1, "new", pods="old")), "new", 0, surge=[1])
    assert [str(turn.step) for turn in turns] == ["Wait", "Keep"]


def test_a_group_that_is_down_is_mended_though_no_surge_group_finds_a_place() -> None:
    turns = plan((group(0, "old", ready=False), group(1, "new", ready=False)), "new", 0, surge=[1])
    assert [str(turn.step) for turn in turns] == ["Replace", "Keep"]


def rollout(**block: Any) -> Rollout:
    return parse_rollout(block, replicas=5)


def test_shares_of_groups_are_rounded_as_deployments_do() -> None:
    assert rollout() == Rollout(max_unavailable=1, max_surge=0)
    assert rollout(maxSurge="25%", maxUnavailable="25%") == Rollout(max_unavailable=1, max_surge=2)
    assert rollout(maxSurge="1%", maxUnavailable="19%") == Rollout(max_unavailable=0, max_surge=1)
    assert rollout(maxUnavailable="19%") == Rollout(max_unavailable=1), "one of the two must leave room"


def wanted(start: int, keep: int, *known: int, **others: Any) -> list[int]:
    need = Need(reason=SurgeReason.ROLLOUT, start=start, keep=keep)
    before = [SurgeGroup(group=index, reason=SurgeReason.ROLLOUT) for index in known]
    return [one.group for one in surge_plan(2, before, [need], **others)]


def test_surge_groups_get_the_next_free_numbers_and_the_ready_ones_stay() -> None:
    assert wanted(2, 2) == [2, 3]
    assert wanted(1, 1, leaving=[2]) == [], "one that still goes counts"
    assert wanted(2, 2, leaving=[2]) == [3]
    assert wanted(0, 1, 2, 3, ready=[3]) == [3]
    assert wanted(0, 0, 2) == []
    assert wanted(1, 1, 1) == [2], "a group below replicas is one of them by now"
