"""A group's life, event by event: what is done, when a wait is over, and what follows it."""

from __future__ import annotations

import msgspec
import pytest
from tests.support.group_life import FAILED, HUNG, GroupLife, broken, lost, stage, state

from lockstep_runtime.config import ServeConfig
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.bus import LoadFailure
from lockstep_runtime.protocol.status import Fault, GroupState
from lockstep_runtime.recovery import actions, events, timing
from lockstep_runtime.recovery.diagnosis import Evidence
from lockstep_runtime.recovery.policy import RESPAWNS
from lockstep_runtime.recovery.stage import Stage
from lockstep_runtime.recovery.timing import HOST, NCCL, timing_of


def test_a_group_is_formed_step_by_step_and_then_serves() -> None:
    life = GroupLife()
    assert (stage(life), state(life)[0]) == (Stage.GATHERING, GroupState.STARTING)
    life.gather()
    assert state(life) == (GroupState.LOADING, "every rank is loaded; they are joining")
    life.proceed()
    assert state(life) == (GroupState.READY, "all 2 ranks are in step")
    [resumed] = life.of(actions.Resume)
    assert (resumed.blocks, resumed.block_size, resumed.first, resumed.respawned) == (39, 4, True, True)
    assert [one.phase for one in life.of(actions.PhaseOver)] == ["abort", "respawn", "rebuild", "verify"]
    assert life.group.next_deadline() is None


def test_a_fault_is_reported_in_its_epoch_and_every_rank_aborted_in_the_next() -> None:
    life = broken()
    [report] = life.of(actions.ReportFault)
    assert (report.cause, report.decision.rung, report.epoch, report.recorded) == (FAILED, "Rebuild", 1, True)
    assert [(one.rank, one.epoch) for one in life.of(actions.SendAbort)] == [(0, 2), (1, 2)]
    assert stage(life) is Stage.GATHERING
    life.left(0)
    life.left(1)
    life.proceed()
    assert life.of(actions.Resume)[-1].kept
    assert not life.of(actions.Resume)[-1].respawned


def test_without_a_step_in_between_the_next_attempt_waits_a_little_longer_each_time() -> None:
    life = GroupLife()
    life.serve()
    waits = []
    for _ in range(8):
        life.fails(Evidence(Fault.STEP_FAILED, None, "again"), steps=0)
        if stage(life) is not Stage.PAUSING:
            break
        due = life.group.next_deadline()
        assert due is not None
        waits.append(round(due - life.now, 3))
        life.wait(due - life.now)
        for kill in life.of(actions.Kill):
            life.exit(kill.rank)
            life.connect(kill.rank)
            life.loaded(kill.rank)
        life.done.clear()
        life.left(0)
        life.left(1)
    assert waits == [0.2, 0.5, 1.0, 2.0, 5.0, 5.0, 5.0, 5.0][: len(waits)]
    assert len(waits) >= 3


# --- ranks that are late


def test_a_rank_that_does_not_leave_its_collective_is_killed_and_the_others_are_not() -> None:
    life = broken()
    life.left(0)
    assert life.wait(HOST.abort - 0.01) == []
    life.wait(0.02)
    [kill] = life.of(actions.Kill)
    assert (kill.rank, kill.reload) == (1, False)
    assert kill.reason == "rank 1 did not leave its collective within 1.5 s"
    assert life.group.policy.respawns.left == RESPAWNS - 1


def test_where_the_one_that_holds_up_the_others_is_known_it_is_killed_first() -> None:
    life = broken(Evidence(Fault.HANG, 1, "rank 1 is waited for"), ranks=3)
    life.wait(HOST.abort)
    assert [one.rank for one in life.of(actions.Kill)] == [1]
    life.left(0)
    life.wait(HOST.abort)
    assert [one.rank for one in life.of(actions.Kill)] == [1, 2]


def test_a_process_that_outlives_its_kill_is_killed_again() -> None:
    life = broken(HUNG)
    assert [one.rank for one in life.of(actions.Kill)] == [1]
    life.left(0)
    life.left(1)  # from the grave: it is not waited for
    assert stage(life) is Stage.GATHERING
    life.wait(timing.DEATH_SECONDS)
    assert [one.rank for one in life.of(actions.Kill)] == [1, 1]
    life.exit(1)
    life.connect(1)
    life.loaded(1)
    assert stage(life) is Stage.ASSEMBLING


def test_nccl_is_given_the_time_that_it_needs() -> None:
    life = broken(backend=NCCL)
    assert life.wait(9.9) == []
    life.wait(0.2)
    assert [one.rank for one in life.of(actions.Kill)] == [1]
    life.exit(1)
    life.wait(NCCL.abort)
    assert [one.rank for one in life.of(actions.Kill)] == [1, 0]


def test_a_survivor_of_a_join_is_given_the_time_of_nccl_s_initialisation() -> None:
    life = GroupLife(backend=NCCL)
    life.gather()
    life.proceed(limit=1)
    life.exit(1)
    life.wait(1.0)
    life.connect(1)
    life.loaded(1)
    life.wait(NCCL.abort_joining - 5.0)
    assert life.of(actions.Kill) == []
    assert NCCL.join.ceiling >= 130.0  # 120 s of initialisation, and 10 of its proof


def test_which_backend_a_group_has_is_in_its_settings() -> None:
    plain = ServeConfig(model="m", served_name="m")
    assert timing_of(msgspec.structs.replace(plain, backend="nccl")).backend is NCCL
    assert timing_of(msgspec.structs.replace(plain, device="cuda")).backend is NCCL
    assert timing_of(msgspec.structs.replace(plain, backend="cpu", device="cuda")).backend is HOST
    assert timing_of(plain).backend is HOST


def test_one_that_lost_its_connection_and_does_not_come_back_is_killed() -> None:
    life = broken()
    life.left(0)
    life.tell(events.RankDisconnected(1))
    life.wait(timing.RECONNECT_SECONDS)
    assert [one.reason for one in life.of(actions.Kill)] == [
        "rank 1 lost its connection and did not come back within 5 s"
    ]


def test_one_that_stands_still_while_it_loads_is_killed_and_one_that_moves_is_not() -> None:
    life = broken(lost(1))
    life.left(0)
    life.exit(1)
    life.connect(1)
    for done in range(1, 6):
        life.wait(14.0)
        life.tell(events.RankReported(1, bus.LoadProgress(bytes_done=done, bytes_total=10)))
    assert life.of(actions.Kill) == []
    life.wait(15.0)
    assert [one.reason for one in life.of(actions.Kill)] == ["rank 1 has read none of its weights for 15 s"]


def test_a_reload_may_stand_still_for_as_long_as_the_longest_took_twice_over() -> None:
    life = GroupLife()
    for rank in range(2):
        life.pod(rank)
        life.connect(rank)
        life.loaded(rank, seconds=20.0)
    life.proceed()
    life.exit(1)
    life.connect(1)
    life.left(0)
    life.wait(39.9)
    assert life.of(actions.Kill) == []
    life.wait(0.2)
    assert len(life.of(actions.Kill)) == 1


def test_ranks_of_a_pod_wait_for_the_one_that_downloads_for_all() -> None:
    life = GroupLife()
    life.pod(0)
    life.connect(0)
    life.group.handles[1].pod_index = 0
    life.tell(events.RankConnected(msgspec.structs.replace(life.hello(1, 1), pod_index=0)))
    for moved in range(1, 10):
        life.wait(100.0)
        life.tell(events.RankReported(0, bus.LoadProgress(bytes_done=0, bytes_total=0, bytes_moved=moved * 10**6)))
    assert life.of(actions.Kill) == []
    assert stage(life) is Stage.GATHERING


# --- and those that never come


def test_a_rank_that_stays_away_poisons_the_group_with_its_name() -> None:
    life = broken(lost(1))
    life.tell(events.PodDisconnected(1))
    life.tell(events.RankDisconnected(1))
    life.left(0)
    life.wait(timing.ABSENT_SECONDS)
    assert stage(life) is Stage.POISONED
    cause = life.of(actions.ReportFault)[-1].cause
    assert (cause.fault, cause.rank) == (Fault.RANK_LOST, 1)
    assert state(life) == (GroupState.POISONED, "rank 1 (pod 1) has been out of reach for 60 s")


def test_a_first_start_waits_longer() -> None:
    life = GroupLife()
    life.pod(0)
    life.connect(0)
    life.loaded(0)
    life.wait(timing.FIRST_SECONDS - 1)
    assert stage(life) is Stage.GATHERING
    life.wait(2.0)
    assert stage(life) is Stage.POISONED
    assert "rank 1 (pod 1) has been out of reach for 300 s" in life.group.poison


def test_a_reload_that_hangs_for_good_poisons_within_three_minutes_and_every_kill_is_charged() -> None:
    life = broken(lost(1))
    life.exit(1)
    life.left(0)
    begun = life.now
    while stage(life) is not Stage.POISONED:
        life.connect(1)
        kills = len(life.of(actions.Kill))
        for _ in range(1000):
            life.wait(1.0)
            if len(life.of(actions.Kill)) > kills or stage(life) is Stage.POISONED:
                break
        life.exit(1)
        assert life.now - begun < 180
    assert life.of(actions.ReportFault)[-1].cause.rank == 1
    assert life.group.policy.respawns.left == RESPAWNS - 1 - len(life.of(actions.NameCulprit))


def test_a_rank_whose_supervisor_is_out_of_reach_and_that_leaves_nothing_is_given_up() -> None:
    life = broken()
    life.left(0)
    life.tell(events.PodDisconnected(1))
    life.wait(timing.ABSENT_SECONDS)
    assert stage(life) is Stage.POISONED
    assert "its supervisor is out of reach" in life.group.poison
    assert life.of(actions.Kill) == []


@pytest.mark.parametrize(
    ("kind", "served", "fault"),
    [
        (LoadFailure.DEVICE_LOST, True, Fault.CONTEXT_FAULT),
        (LoadFailure.DEVICE_LOST, False, Fault.CONTEXT_FAULT),
        (LoadFailure.PERMANENT, True, Fault.RANK_LOST),
        (LoadFailure.PERMANENT, False, None),
        (LoadFailure.TRANSIENT, True, None),
        (LoadFailure.TRANSIENT, False, None),
    ],
)
def test_a_load_that_can_not_succeed_is_not_waited_for(kind: LoadFailure, served: bool, fault: Fault | None) -> None:
    life = GroupLife()
    if served:
        life.serve()
        life.exit(1)
    life.pod(1)
    life.connect(1)
    life.tell(events.RankReported(1, bus.LoadFailed(message="no such kernel", kind=kind)))
    if fault is None:
        assert state(life) == (GroupState.FAILED, "no such kernel")
    else:
        cause = life.of(actions.ReportFault)[-1].cause
        assert (cause.fault, cause.rank, stage(life)) == (fault, 1, Stage.POISONED)
        assert state(life) == (GroupState.POISONED, "rank 1 can't load: no such kernel")


def test_a_first_load_may_fail_with_words_any_number_of_times_and_without_words_only_so_often() -> None:
    life = GroupLife()
    life.pod(1)
    for _ in range(50):
        life.connect(1)
        life.tell(events.RankReported(1, bus.LoadFailed(message="no room")))
        life.exit(1)
    assert state(life) == (GroupState.FAILED, "no room")
    other = GroupLife()
    other.pod(1)
    for _ in range(RESPAWNS):
        other.connect(1)
        other.exit(1)
    assert stage(other) is Stage.GATHERING
    other.connect(1)
    other.exit(1)
    assert stage(other) is Stage.POISONED
    assert "rank 1 (pid 11) was killed by SIGKILL before it was loaded, again and again" in other.group.poison
