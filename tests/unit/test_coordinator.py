"""A group's life, event by event: what is done, when a wait is over, and what follows it."""

from __future__ import annotations

import random

import msgspec
import pytest
from tests.support.group_life import GroupLife, lost

from lockstep_runtime import wire
from lockstep_runtime.recovery import actions, events, timing
from lockstep_runtime.recovery.coordinator import Stage
from lockstep_runtime.recovery.diagnosis import Evidence
from lockstep_runtime.recovery.group_state import group_state, is_accepting
from lockstep_runtime.recovery.policy import RESPAWNS
from lockstep_runtime.recovery.timing import HOST, NCCL, timing_of
from lockstep_runtime.wire import Fault, GroupState, LoadFailure

HUNG = Evidence(Fault.HANG, 1, "rank 1 stopped", stragglers=(1,))
FAILED = Evidence(Fault.STEP_FAILED, 1, "rank 1: out of memory")


def stage(life: GroupLife) -> Stage:
    return life.group.stage


def state(life: GroupLife) -> tuple[GroupState, str]:
    return group_state(life.group, life.now, draining=False, blocker="")


def broken(cause: Evidence = FAILED, **settings: object) -> GroupLife:
    """One that served, and whose ranks are to leave their collectives now."""
    life = GroupLife(**settings)  # type: ignore[arg-type] # a test's own settings
    life.serve()
    life.done.clear()
    life.fails(cause)
    return life


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
    assert {one.rank for one in life.of(actions.Kill)} == {0, 1} or len(life.of(actions.Kill)) == 1
    config = GroupLife().group
    assert config is not None
    from lockstep_runtime.config import ServeConfig

    plain = ServeConfig(model="m", served_name="m")
    assert timing_of(msgspec.structs.replace(plain, backend="nccl")).backend is NCCL
    assert timing_of(msgspec.structs.replace(plain, device="cuda")).backend is NCCL
    assert timing_of(msgspec.structs.replace(plain, backend="gloo", device="cuda")).backend is HOST
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
        life.tell(events.RankReported(1, wire.LoadProgress(bytes_done=done, bytes_total=10)))
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
        life.tell(events.RankReported(0, wire.LoadProgress(bytes_done=0, bytes_total=0, bytes_moved=moved * 10**6)))
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
    life.tell(events.RankReported(1, wire.LoadFailed(message="no such kernel", kind=kind)))
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
        life.tell(events.RankReported(1, wire.LoadFailed(message="no room")))
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


# --- poisoned


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
        moved = wire.LoadProgress(bytes_done=int(life.now), bytes_total=10**6)
        life.tell(events.RankReported(1, moved))
        assert state(life)[0] is GroupState.RECOVERING
        assert is_accepting(life.group, GroupState.RECOVERING)
    assert actions.StatusChanged() in life.wait(14.0)
    assert not is_accepting(life.group, GroupState.RECOVERING)
    assert is_accepting(life.group, GroupState.READY)


# --- the proof, and the caches


def reformed(life: GroupLife) -> GroupLife:
    """Broken, and all ranks are idle again."""
    life.done.clear()
    life.fails(FAILED)
    life.left(0)
    life.left(1)
    return life


def test_a_probe_that_differs_every_time_on_ranks_whose_weights_are_right_is_accepted_and_remembered() -> None:
    life = GroupLife()
    life.serve()
    life.fingerprint = 8
    reformed(life).proceed()
    assert stage(life) is Stage.SERVING
    assert any("accepted" in one.words for one in life.of(actions.Log))
    reformed(life)
    asked = len(life.of(actions.Ask))
    life.proceed()
    assert stage(life) is Stage.SERVING
    assert asked <= 1  # no scrub


def test_it_is_corruption_where_no_weights_are_watched() -> None:
    life = GroupLife()
    life.serve()
    life.fingerprint, life.tensors = 8, 0
    reformed(life).proceed()
    [_, report] = life.of(actions.ReportFault)
    assert (report.cause.fault, report.cause.rank, report.decision.kill) == (Fault.CORRUPTION, None, (0, 1))
    assert report.cause.message.startswith("the probe's fingerprint is 0000000000000008, and was 0000000000000007")


def test_it_is_corruption_where_the_probe_gives_something_else_every_time() -> None:
    life = GroupLife()
    life.serve()
    prints = iter([8, 8, 9])
    reformed(life)
    for _ in range(8):
        call = life.call()
        if stage(life) is not Stage.ASSEMBLING or call is None:
            break
        if isinstance(call, actions.RunStep):
            life.fingerprint = next(prints)
        life.done = [one for one in life.done if one is not call]
        life.tell(events.CallDone(life.answer(call)))
    assert life.of(actions.ReportFault)[-1].cause.fault is Fault.CORRUPTION
    assert next(prints, None) is None


def test_a_rank_that_has_no_room_yet_is_asked_again_and_nobody_shrinks() -> None:
    life = GroupLife()
    life.serve()
    life.offers[1] = 20
    life.exit(1)
    life.connect(1)
    life.loaded(1)
    life.left(0)
    for _ in range(3):
        life.proceed(limit=3)
        assert life.of(actions.AllocateCaches) == []
        life.wait(timing.ROOM_LOOK_SECONDS)
        assert life.of(actions.AllocateCaches)[-1].blocks == 40
    life.offers[1] = 40
    life.proceed()
    assert stage(life) is Stage.SERVING
    assert life.of(actions.Resume)[-1].blocks == 39


def test_when_there_is_no_room_for_long_all_get_less_and_later_all_again() -> None:
    life = GroupLife()
    life.serve()
    life.offers[1] = 20
    life.exit(1)
    life.connect(1)
    life.loaded(1)
    life.left(0)
    for _ in range(15):
        life.proceed(limit=3)
        life.wait(timing.ROOM_LOOK_SECONDS)
    life.proceed()
    assert life.of(actions.Resume)[-1].blocks == 19
    life.offers[1] = 40
    life.exit(1)
    life.connect(1)
    life.loaded(1)
    life.left(0)
    life.proceed()
    assert life.of(actions.Resume)[-1].blocks == 39


def test_contents_of_an_attempt_that_never_served_are_no_reason_to_go_on_from_the_caches() -> None:
    life = GroupLife()
    life.serve()
    life.exit(1)
    life.connect(1)
    life.loaded(1)
    life.left(0)
    life.proceed(limit=3)
    assert life.of(actions.PhaseOver)[-1].phase == "rebuild"  # the new caches are laid out, the proof is under way
    life.fails(FAILED, steps=0)
    life.wait(1.0)
    life.left(0)
    life.left(1)
    life.proceed()
    assert not life.of(actions.Resume)[-1].kept


def test_the_model_s_configuration_is_waited_for_and_its_absence_told() -> None:
    life = GroupLife(model_known=False)
    life.gather()
    life.proceed()
    assert stage(life) is Stage.WAITING
    life.wait(timing.MODEL_SECONDS - 1)
    assert state(life)[0] is GroupState.LOADING
    life.wait(2.0)
    assert state(life)[0] is GroupState.FAILED
    assert "could not read toy's config.json yet" in state(life)[1]
    life.tell(events.ModelRead())
    assert state(life)[0] is GroupState.READY


def test_a_rank_lost_while_the_model_is_read_is_not_overlooked() -> None:
    life = GroupLife(model_known=False)
    life.gather()
    life.proceed()
    life.exit(1)
    assert life.of(actions.ReportFault)[-1].cause.rank == 1
    life.wait(1.0)
    life.connect(1)
    life.loaded(1)
    life.left(0)
    life.proceed()
    assert stage(life) is Stage.WAITING


def test_a_rank_that_is_lost_after_it_has_answered_is_not_overlooked() -> None:
    life = GroupLife(fails_at_once=False)
    life.gather()
    call = life.call()
    assert call is not None
    answers = life.answer(call)
    life.exit(1)
    life.tell(events.CallDone(answers))
    assert life.of(actions.ReportFault)[-1].cause.rank == 1


def test_attempts_that_fail_one_after_the_other_end() -> None:
    life = GroupLife()
    life.serve()
    begun = life.now
    life.fails(Evidence(Fault.STEP_FAILED, None, "by a request"), steps=0, by_request=True)
    while stage(life) is not Stage.POISONED:
        life.wait(10.0)
        for kill in life.of(actions.Kill):
            life.exit(kill.rank)
            life.connect(kill.rank)
            life.loaded(kill.rank)
        life.done.clear()
        life.left(0)
        life.left(1)
        if stage(life) is Stage.ASSEMBLING:
            life.fails(Evidence(Fault.RANK_LOST, None, "the collective broke"), steps=0, by_request=True)
        assert life.now - begun < HOST.attempts + 60
    assert life.now - begun > HOST.attempts / 2


# --- whatever happens


def _event(life: GroupLife, chance: random.Random) -> None:
    rank = chance.randrange(life.ranks)
    known = life.processes.get(rank, 0) > 0
    here = life.group.handles[rank].hello is not None
    match chance.randrange(12):
        case 0:
            life.pod(rank, chance.choice("ab"))
        case 1:
            life.tell(events.PodDisconnected(rank))
        case 2:
            life.connect(rank)
        case 3 if here:
            life.tell(events.RankDisconnected(rank))
        case 4 if known:
            life.exit(rank)
        case 5 if here:
            life.loaded(rank)
        case 6 if here:
            life.left(rank)
        case 7 if here:
            life.tell(events.RankReported(rank, wire.LoadProgress(bytes_done=chance.randrange(9), bytes_total=9)))
        case 8 if here:
            kind = chance.choice(list(LoadFailure))
            life.tell(events.RankReported(rank, wire.LoadFailed(message="no", kind=kind)))
        case 9 if known:
            life.tell(events.RankStopped(rank, life.name(rank, life.processes[rank]), 1, "SIGSTOP"))
        case 10 if stage(life) in (Stage.ASSEMBLING, Stage.SERVING):
            life.fails(
                Evidence(chance.choice(list(Fault)), chance.choice([None, rank]), "words"), steps=chance.randrange(2)
            )
        case 11:
            life.proceed(limit=chance.randrange(8))
        case _:
            pass


def explains_itself(life: GroupLife) -> bool:
    """A first load has failed with words: `Failed` may last."""
    return not life.group.has_served and any(one.state is wire.RankState.FAILED for one in life.group.handles)


@pytest.mark.parametrize("first", range(0, 2000, 100))
def test_whatever_happens_every_state_ends_by_itself(first: int) -> None:
    for seed in range(first, first + 100):
        chance = random.Random(seed)
        life = GroupLife(ranks=chance.randint(1, 3))
        epochs = [0]
        for _ in range(chance.randint(1, 60)):
            _event(life, chance)
            life.wait(chance.choice([0.0, 0.0, 0.1, 1.0, 20.0, 200.0]))
            assert life.group.epoch >= epochs[-1]
            epochs.append(life.group.epoch)
            if stage(life) is Stage.GATHERING:
                failed = not life.group.has_served and any(
                    one.state is wire.RankState.FAILED for one in life.group.handles
                )
                assert failed or life.group.next_deadline() is not None, f"seed {seed}"
            assert 0 <= life.group.policy.respawns.left <= RESPAWNS
        if stage(life) is Stage.ASSEMBLING and life.group.next_deadline() is None:
            life.fails(Evidence(Fault.HANG, None, "no answer"), steps=0)  # a call's own deadline
        life.wait(0.0)
        patience = 0
        while stage(life) in (Stage.PAUSING, Stage.GATHERING) and patience < 20:
            life.wait(50.0)
            patience += 1
        explained = not life.group.has_served and any(one.state is wire.RankState.FAILED for one in life.group.handles)
        assert patience < 20 or explained, f"seed {seed}: {stage(life)}"
