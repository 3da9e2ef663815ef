"""A group's life from ranks that are loaded to one that serves: caches, proof, and attempts that fail."""

from __future__ import annotations

from tests.support.group_life import FAILED, GroupLife, stage, state

from lockstep_runtime.protocol.status import Fault, GroupState
from lockstep_runtime.recovery import actions, events, timing
from lockstep_runtime.recovery.diagnosis import Evidence
from lockstep_runtime.recovery.stage import Stage
from lockstep_runtime.recovery.timing import HOST


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
    assert any("accepted" in one.message for one in life.of(actions.Log))
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
    life.exit_after_answering(1)
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
