"""What the supervisor does when something happens."""

from __future__ import annotations

from signal import SIGKILL, SIGTERM

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep_runtime.supervisor.state_machine import (
    ENGINE,
    FETCHER,
    LONGEST_BACKOFF,
    SILENT_SECONDS,
    SLOW_BACKOFF,
    STOPPED_SECONDS,
    ZYGOTE,
    Action,
    Finish,
    Machine,
    Name,
    NotifyLeaving,
    Phase,
    SayStopped,
    Signal,
    Spawn,
    backoff,
)


def leader() -> Machine:
    """With everything started."""
    machine = Machine(ranks=range(2), is_leader=True, grace_seconds=30.0)
    assert machine.start(0.0) == [Spawn(ZYGOTE), Spawn(ENGINE)]
    assert machine.zygote_ready(0.0) == [Spawn(0), Spawn(1)]
    return machine


def member() -> Machine:
    machine = Machine(ranks=range(2, 4), is_leader=False, grace_seconds=30.0)
    assert machine.start(0.0) == [Spawn(ZYGOTE)]
    assert machine.zygote_ready(0.0) == [Spawn(2), Spawn(3)]
    return machine


def signalled(actions: list[Action]) -> list[Name]:
    return [action.name for action in actions if isinstance(action, Signal)]


def test_a_healthy_worker_that_dies_is_started_at_once_every_time() -> None:
    machine = leader()
    for now in range(20):
        assert machine.exited(1, healthy=True, now=float(now)) == [Spawn(1)]


def test_one_that_never_gets_loaded_waits_longer_and_longer() -> None:
    machine = leader()
    now, waits = 0.0, []
    for _ in range(9):
        if machine.exited(1, healthy=False, now=now) == [Spawn(1)]:
            waits.append(0.0)
            continue
        machine.heard(now)  # the engine lives
        due = machine.next_deadline()
        assert due is not None
        waits.append(due - now)
        assert machine.tick(due - 0.01) == []
        assert machine.tick(due) == [Spawn(1)]
        now = due
    assert waits == [0, 1, 2, 4, 8, 16, 30, 30, 30]
    assert machine.exited(1, healthy=True, now=now) == [Spawn(1)]


def test_a_dead_engine_is_started_again_and_the_workers_are_left_alone() -> None:
    machine = leader()
    assert machine.exited(ENGINE, healthy=True, now=1.0) == [Spawn(ENGINE)]


def test_a_leader_drains_its_engine_before_it_ends_its_workers() -> None:
    machine = leader()
    assert machine.asked_to_end(10.0, connected=True) == [Signal(ENGINE, SIGTERM, "drain")]
    assert machine.exited(1, healthy=True, now=11.0) == [Spawn(1)]  # the running requests still need it
    reason = "the engine has drained"
    names: list[Name] = [ZYGOTE, 0, 1]
    assert machine.exited(ENGINE, healthy=True, now=20.0) == [Signal(name, SIGTERM, reason) for name in names]
    assert machine.exited(ZYGOTE, healthy=True, now=20.0) == []
    assert machine.exited(0, healthy=True, now=20.1) == []
    assert machine.exited(1, healthy=True, now=20.2) == [Finish(reason)]


def test_a_drain_is_over_when_the_grace_is() -> None:
    machine = leader()
    machine.asked_to_end(10.0, connected=True)
    assert machine.next_deadline() == 45.0
    assert len(machine.tick(45.0)) == 4
    assert machine.tick(47.9) == []
    assert [action for action in machine.tick(48.1) if isinstance(action, Signal) and action.number == SIGKILL]


def test_a_member_keeps_its_workers_until_it_is_released() -> None:
    machine = member()
    assert machine.released(1.0) == []  # it was not asked to end
    assert machine.asked_to_end(10.0, connected=True) == [NotifyLeaving(30.0)]
    assert machine.phase is Phase.LEAVING
    assert signalled(machine.released(12.0)) == [ZYGOTE, 2, 3]
    machine.exited(ZYGOTE, healthy=True, now=12.1)
    machine.exited(2, healthy=True, now=12.1)
    assert machine.exited(3, healthy=True, now=12.2) == [Finish("released")]


@pytest.mark.parametrize("how", ["disconnected", "grace", "not connected", "twice"])
def test_a_member_does_not_wait_for_an_engine_that_is_gone(how: str) -> None:
    machine = member()
    actions = machine.asked_to_end(10.0, connected=how != "not connected")
    if how == "disconnected":
        actions = machine.disconnected(11.0)
    elif how == "grace":
        actions = machine.tick(40.0)
    elif how == "twice":
        actions = machine.asked_to_end(11.0, connected=True)
    assert signalled(actions) == [ZYGOTE, 2, 3]


def test_a_lost_connection_alone_ends_nothing() -> None:
    machine = member()
    assert machine.disconnected(1.0) == []


def test_a_kill_is_for_a_living_worker_of_this_pod() -> None:
    machine = leader()
    assert machine.kill(1, "it hangs") == [Signal(1, SIGKILL, "it hangs")]
    assert machine.kill(5, "it hangs") == []
    machine.exited(1, healthy=False, now=1.0)
    machine.exited(1, healthy=False, now=2.0)
    assert machine.kill(1, "it hangs") == []  # it waits to be started


def test_backoff_doubles_up_to_half_a_minute_and_stays_there_for_good() -> None:
    assert backoff(1_000_000) == LONGEST_BACKOFF
    assert [backoff(failures) for failures in range(9)] == [0, 0, 1, 2, 4, 8, 16, 30, 30]


def test_ranks_wait_for_a_ready_zygote() -> None:
    machine = Machine(ranks=range(2), is_leader=False, grace_seconds=30.0)
    machine.start(0.0)
    assert machine.tick(60.0) == []
    assert machine.next_deadline() is None
    assert machine.exited(ZYGOTE, healthy=False, now=61.0) == [Spawn(ZYGOTE)]
    assert machine.zygote_ready(65.0) == [Spawn(0), Spawn(1)]


def test_without_its_zygote_a_group_lives_on_and_a_rank_that_dies_waits_for_the_next() -> None:
    machine = leader()
    assert machine.exited(ZYGOTE, healthy=True, now=10.0) == [Spawn(ZYGOTE)]
    assert machine.exited(1, healthy=True, now=11.0) == []
    assert machine.zygote_ready(15.0) == [Spawn(1)]


def test_a_zygote_that_gives_a_rank_no_process_is_replaced() -> None:
    machine = leader()
    assert machine.exited(1, healthy=True, now=9.0) == [Spawn(1)]
    assert machine.spawn_failed(1, "no answer", 14.0, zygote_is_lost=True) == [Signal(ZYGOTE, SIGKILL, "no answer")]
    assert machine.tick(14.1) == []
    assert machine.exited(ZYGOTE, healthy=True, now=14.2) == [Spawn(ZYGOTE)]
    assert machine.zygote_ready(18.0) == [Spawn(1)]


def test_of_a_zygote_that_has_ended_meanwhile_no_other_is_killed() -> None:
    machine = leader()
    assert machine.exited(1, healthy=True, now=9.0) == [Spawn(1)]
    assert machine.exited(ZYGOTE, healthy=True, now=9.1) == [Spawn(ZYGOTE)]
    assert machine.spawn_failed(1, "it has ended", 9.2, zygote_is_lost=True) == []
    assert machine.zygote_ready(12.0) == [Spawn(1)]


@pytest.mark.parametrize("name", [ENGINE, ZYGOTE, 1])
def test_what_the_kernel_refuses_to_start_is_tried_again_later_and_later(name: Name) -> None:
    machine = leader()
    now, waits = 10.0, []
    assert machine.exited(name, healthy=True, now=now) == [Spawn(name)]
    for _ in range(7):
        again = machine.spawn_failed(name, "Argument list too long", now)
        due = now if again else machine.next_deadline()
        assert due is not None
        assert again or machine.tick(due) == [Spawn(name)]
        waits.append(due - now)
        now = due
    assert waits == [0, 1, 2, 4, 8, 16, 30]


def test_an_end_that_is_asked_for_meanwhile_waits_for_no_process_that_never_came() -> None:
    machine = member()
    machine.exited(2, healthy=True, now=1.0)
    assert signalled(machine.asked_to_end(1.1, connected=False)) == [ZYGOTE, 2, 3]
    machine.exited(ZYGOTE, healthy=True, now=1.2)
    machine.exited(3, healthy=True, now=1.2)
    assert machine.spawn_failed(2, "no answer", 1.3, zygote_is_lost=True) == [Finish("no engine needs this pod")]


def test_an_engine_that_gives_no_sign_of_life_is_killed() -> None:
    machine = leader()
    machine.heard(50.0)
    due = machine.next_deadline()
    assert due == 50.0 + SILENT_SECONDS
    assert machine.tick(due - 0.1) == []
    assert signalled(machine.tick(due)) == [ENGINE]
    assert machine.exited(ENGINE, healthy=True, now=due + 0.1) == [Spawn(ENGINE)]
    assert machine.next_deadline() == due + 0.1 + SILENT_SECONDS  # also one that never gets to its first


def test_a_supervisor_that_was_itself_away_waits_for_a_sign_of_life() -> None:
    machine = leader()
    machine.heard(50.0)
    back = 50.0 + SILENT_SECONDS + 3600
    assert machine.tick(back) == []
    due = machine.next_deadline()
    assert due is not None
    assert due - back < SILENT_SECONDS
    assert signalled(machine.tick(due)) == [ENGINE]


def test_an_engine_that_drains_is_not_hung_but_for_its_grace() -> None:
    machine = leader()
    machine.asked_to_end(1.0, connected=True)
    machine.heard(2.0)
    assert machine.next_deadline() == 1.0 + 30.0 + 5.0


def test_a_leader_whose_engine_can_not_be_started_drains_nothing() -> None:
    machine = leader()
    machine.exited(ENGINE, healthy=True, now=1.0)
    machine.asked_to_end(1.1, connected=True)
    assert signalled(machine.spawn_failed(ENGINE, "no", 1.2)) == [ZYGOTE, 0, 1]


def test_a_zygote_that_dies_young_is_started_again_later_and_later() -> None:
    machine = leader()
    now, waits = 10.0, []
    for _ in range(4):
        started = machine.exited(ZYGOTE, healthy=False, now=now)
        due = now if started else machine.next_deadline()
        assert due is not None
        waits.append(due - now)
        assert started or machine.tick(due) == [Spawn(ZYGOTE)]
        now = due
    assert waits == [0, 1, 2, 4]


def test_a_worker_that_stays_stopped_is_told_and_any_other_child_is_killed() -> None:
    machine = leader()
    machine.stopped(1, 19, 10.0)
    machine.stopped(ENGINE, 19, 10.0)
    machine.stopped(0, 19, 10.0)
    machine.continued(0)
    assert machine.tick(10.0 + STOPPED_SECONDS) == [
        SayStopped(1, 19),
        Signal(ENGINE, SIGKILL, "it was stopped by signal 19"),
    ]
    assert machine.tick(11.0) == []
    assert SayStopped(1, 19) in machine.tick(16.0)  # the engine may not have heard it
    assert machine.kill(1, "stopped") == [Signal(1, SIGKILL, "stopped")]
    assert machine.exited(1, healthy=True, now=16.1) == [Spawn(1)]
    assert machine.tick(60.0) == [Signal(ENGINE, SIGKILL, "it was stopped by signal 19")]


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("exit"), st.sampled_from([0, 1, ENGINE, ZYGOTE]), st.booleans()),
        st.tuples(st.just("stop"), st.sampled_from([0, 1, ENGINE, ZYGOTE]), st.booleans()),
        st.tuples(st.just("ready"), st.just(0), st.booleans()),
        st.tuples(st.just("unspawned"), st.sampled_from([0, 1]), st.booleans()),
        st.tuples(st.just("end"), st.just(0), st.booleans()),
        st.tuples(st.just("wait"), st.integers(0, 60), st.booleans()),
        st.tuples(st.just("release"), st.just(0), st.booleans()),
        st.tuples(st.just("disconnect"), st.just(0), st.booleans()),
    ),
    max_size=60,
)


@given(is_leader=st.booleans(), events=EVENTS)
def test_whatever_happens_no_child_is_doubled_or_left_over(
    is_leader: bool, events: list[tuple[str, Name, bool]]
) -> None:
    machine = Machine(ranks=range(2), is_leader=is_leader, grace_seconds=30.0)
    alive: set[Name] = set()
    finished = False
    now = 0.0

    def do(actions: list[object]) -> None:
        nonlocal finished
        for action in actions:
            assert not finished, "it acts after its end"
            if isinstance(action, Spawn):
                assert action.name not in alive
                assert ZYGOTE in alive or not isinstance(action.name, int)
                alive.add(action.name)
            elif isinstance(action, SayStopped):
                assert action.rank in alive
            elif isinstance(action, Signal):
                assert action.name in alive
            elif isinstance(action, Finish):
                finished = True
                assert not alive

    do([*machine.start(now)])
    for kind, value, flag in events:
        if kind == "exit" and value in alive:
            alive.discard(value)
            do([*machine.exited(value, healthy=flag, now=now)])
        elif kind == "stop" and value in alive:
            machine.stopped(value, 19, now)
            if flag:
                machine.continued(value)
        elif kind == "ready" and ZYGOTE in alive:
            do([*machine.zygote_ready(now)])
        elif kind == "unspawned" and value in alive:
            alive.discard(value)
            do([*machine.spawn_failed(value, "no answer", now, zygote_is_lost=flag)])
        elif kind == "end":
            do([*machine.asked_to_end(now, connected=flag)])
        elif kind == "wait" and isinstance(value, int):
            now += value
            do([*machine.tick(now)])
        elif kind == "release":
            do([*machine.released(now)])
        elif kind == "disconnect":
            do([*machine.disconnected(now)])
    if not finished:
        do([*machine.asked_to_end(now, connected=False)])
        for _ in range(8):
            now += 100.0
            do([*machine.tick(now)])
            for name in sorted(alive, key=str):
                if not finished and machine.phase is not Phase.RUNNING:
                    alive.discard(name)
                    do([*machine.exited(name, healthy=False, now=now)])
    assert finished


def test_a_load_that_can_not_succeed_yet_is_tried_again_slowly() -> None:
    machine = leader()
    assert machine.exited(1, healthy=False, now=1.0, slowly=True) == []
    assert machine.tick(1.0 + SLOW_BACKOFF - 0.1) == []
    assert machine.tick(1.0 + SLOW_BACKOFF) == [Spawn(1)]


def test_a_word_of_an_engine_that_has_ended_changes_nothing() -> None:
    machine = leader()
    for _ in range(3):
        machine.exited(ENGINE, healthy=False, now=5.0)
    due = machine.next_deadline()
    machine.heard(5.0)
    assert (machine.next_deadline(), machine.failures(ENGINE), machine.failures(0)) == (due, 3, 0)


def test_a_leaders_fetcher_begins_at_once_and_is_not_started_again_when_it_has_done_its_work() -> None:
    machine = Machine(ranks=range(1), is_leader=True, grace_seconds=30.0, fetches=True)
    assert machine.start(0.0) == [Spawn(ZYGOTE), Spawn(FETCHER), Spawn(ENGINE)]
    assert machine.fetch(0.5) == []  # it is at it
    assert machine.exited(FETCHER, healthy=False, now=1.0) == [Spawn(FETCHER)]
    assert machine.fetched(2.0) == []
    assert machine.tick(1000.0)[:1] != [Spawn(FETCHER)]
    assert machine.fetch(1001.0) == [Spawn(FETCHER)]


def test_a_members_fetcher_waits_for_the_commit() -> None:
    machine = Machine(ranks=range(1, 2), is_leader=False, grace_seconds=30.0, fetches=True, may_fetch=False)
    assert machine.start(0.0) == [Spawn(ZYGOTE)]
    assert machine.zygote_ready(0.0) == [Spawn(1)]
    assert machine.next_deadline() is None
    assert machine.fetch(5.0) == [Spawn(FETCHER)]


def test_a_fetcher_that_was_killed_waits_as_others_do_and_whoever_is_told_to_fetch_does_not_shorten_that() -> None:
    machine = Machine(ranks=range(1), is_leader=False, grace_seconds=30.0, fetches=True)
    machine.start(0.0)
    assert machine.exited(FETCHER, healthy=False, now=0.0) == [Spawn(FETCHER)]
    assert machine.exited(FETCHER, healthy=False, now=0.0) == []
    assert machine.fetch(0.5) == []
    assert machine.fetch(1.0) == [Spawn(FETCHER)]


def test_a_pod_that_stops_ends_its_fetcher_too() -> None:
    machine = Machine(ranks=range(1), is_leader=False, grace_seconds=30.0, fetches=True)
    machine.start(0.0)
    assert signalled(machine.asked_to_end(1.0, connected=False)) == [ZYGOTE, FETCHER]
    assert machine.exited(ZYGOTE, healthy=True, now=1.1) == []
    assert machine.fetch(1.2) == []
    assert machine.fetched(1.2) == [Finish("no engine needs this pod")]


def test_a_folder_is_not_fetched() -> None:
    machine = member()
    assert machine.fetch(1.0) == []
