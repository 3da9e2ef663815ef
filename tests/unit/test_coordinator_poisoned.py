"""A group that can't heal itself: when it tries again, and how long requests are taken before."""

from __future__ import annotations

from tests.support.group_life import GroupLife, broken, lost, stage, state

from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.status import Fault, GroupState
from lockstep_runtime.recovery import actions, events, timing
from lockstep_runtime.recovery.diagnosis import Evidence
from lockstep_runtime.recovery.group_state import is_accepting
from lockstep_runtime.recovery.stage import Stage


def poisoned(**settings: object) -> GroupLife:
    life = broken(Evidence(Fault.RANK_LOST, 1, "for good", final=True), **settings)
    assert stage(life) is Stage.POISONED
    return life


def test_a_poisoned_group_tries_again_by_itself_ever_more_seldom() -> None:
    life = poisoned()
    waits = []
    for _ in range(7):
        due = life.group.next_deadline()
        assert due is not None
        waits.append(due - life.now)
        life.done.clear()
        life.wait(due - life.now)
        assert {one.rank for one in life.of(actions.Kill)} == {0, 1}
        assert stage(life) is Stage.GATHERING
        while stage(life) is not Stage.POISONED:
            life.wait(1.0)  # no process ends, none comes
        life.group.policy.credit_healthy_time(1000.0, steps=False)
    assert [round(one) for one in waits] == [30, 60, 120, 240, 300, 300, 300]


def test_a_new_pod_or_one_that_was_away_is_reason_enough_to_try_again_and_nobody_is_killed() -> None:
    for incarnation, away in (("another", False), ("s", True)):
        life = poisoned()
        if away:
            life.tell(events.PodDisconnected(1))
        life.done.clear()
        life.pod(1, incarnation)
        assert stage(life) is Stage.GATHERING
        assert life.of(actions.Kill) == []
        assert life.group.poison == ""
    same = poisoned()
    same.pod(1, "s")
    assert stage(same) is Stage.POISONED


def test_by_the_strategy_recycle_pods_only_a_new_pod_ends_it() -> None:
    life = broken(recovery_strategy="RecyclePods")
    assert stage(life) is Stage.POISONED
    life.wait(10_000.0)
    assert stage(life) is Stage.POISONED
    life.pod(1, "another")
    assert stage(life) is Stage.GATHERING


def test_requests_are_taken_for_two_minutes_of_a_recovery() -> None:
    life = broken(lost(1))
    life.left(0)
    life.exit(1)
    life.connect(1)
    begun = life.now
    while life.now - begun < 105:
        life.wait(10.0)
        moved = bus.LoadProgress(bytes_done=int(life.now), bytes_total=10**6)
        life.tell(events.RankReported(1, moved))
        assert state(life)[0] is GroupState.RECOVERING
        assert is_accepting(life.group, GroupState.RECOVERING)
    assert actions.StatusChanged() in life.wait(14.0)
    assert not is_accepting(life.group, GroupState.RECOVERING)
    assert is_accepting(life.group, GroupState.READY)


def test_a_first_download_goes_on_while_the_group_is_poisoned() -> None:
    life = GroupLife(ranks=3)
    for rank in (0, 1):
        life.pod(rank)
        life.connect(rank)
    while stage(life) is not Stage.POISONED:  # rank 2 never comes
        life.wait(10.0)
        moved = bus.LoadProgress(bytes_done=0, bytes_total=0, bytes_moved=int(life.now) * 10**6)
        life.tell(events.RankReported(0, moved))
        if life.of(actions.Kill) and life.group.handles[1].hello is not None:
            life.exit(1)
            life.connect(1)
    life.done.clear()
    while stage(life) is Stage.POISONED:
        life.wait(10.0)
        moved = bus.LoadProgress(bytes_done=0, bytes_total=0, bytes_moved=int(life.now) * 10**6)
        life.tell(events.RankReported(0, moved))
    assert 0 not in [one.rank for one in life.of(actions.Kill)]


def test_the_next_try_of_a_first_start_ends_every_load_that_hangs() -> None:
    life = GroupLife()
    for rank in (0, 1):
        life.pod(rank)
        life.connect(rank)
    life.group.policy.respawns.left = 0.0
    life.wait(timing.LOADING_SECONDS)
    assert [one.rank for one in life.of(actions.Kill)] == [0]
    assert stage(life) is Stage.POISONED
    life.wait(timing.POISONED_SECONDS[0])
    assert 1 in [one.rank for one in life.of(actions.Kill)]
