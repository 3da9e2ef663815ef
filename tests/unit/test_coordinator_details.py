"""A group's life in its details: seconds, budgets, whose process reloads, and what is said of whom."""

from __future__ import annotations

import msgspec
import pytest
from tests.support.group_life import FAILED, HUNG, GroupLife, broken, stage, state

from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.bus import LoadFailure
from lockstep_runtime.protocol.status import Download, Fault, GroupState, RankState
from lockstep_runtime.recovery import actions, events, timing
from lockstep_runtime.recovery.diagnosis import Evidence
from lockstep_runtime.recovery.group_state import group_state, slowest_download
from lockstep_runtime.recovery.policy import REBUILD_REFILL_SECONDS, REBUILDS, Rung
from lockstep_runtime.recovery.stage import Stage
from lockstep_runtime.recovery.timing import ACCEPTING_SECONDS, HOST, RETRY_SECONDS


def answer_slowly(life: GroupLife, seconds: float = 0.5) -> list[str]:
    """Every call takes so long; returns their kinds."""
    asked: list[str] = []
    while stage(life) is Stage.ASSEMBLING and (call := life.call()) is not None:
        life.done = [one for one in life.done if one is not call]
        asked.append(type(call).__name__)
        life.now += seconds
        life.tell(events.CallDone(life.answer(call)))
    return asked


def repaired(life: GroupLife) -> GroupLife:
    """Both ranks have left, and it serves again."""
    life.left(0)
    life.left(1)
    life.proceed()
    assert stage(life) is Stage.SERVING
    return life


def test_every_phase_of_a_repair_is_timed_from_where_the_one_before_ended() -> None:
    life = GroupLife(now=0.05)
    life.serve()
    life.done.clear()
    life.exit(1)
    life.now += 0.123456
    life.left(0)
    life.now += 2.0
    life.connect(1)
    life.loaded(1)
    assert answer_slowly(life) == ["Ask", "Ask", "AllocateCaches", "RunStep"]  # nobody warms up again
    spans = {one.phase: one.seconds for one in life.of(actions.PhaseOver)}
    assert spans == pytest.approx({"abort": 0.123456, "respawn": 2.0, "rebuild": 1.5, "verify": 0.5})
    [resumed] = life.of(actions.Resume)
    assert resumed.phases == {"abort": 0.1235, "respawn": 2.0, "rebuild": 1.5, "verify": 0.5}
    assert (resumed.respawned, resumed.first) == (True, False)
    assert [handle.state for handle in life.group.handles] == [RankState.READY] * 2


def test_only_the_first_time_is_warmed_up() -> None:
    life = GroupLife()
    life.gather()
    assert answer_slowly(life) == ["Ask", "Ask", "AllocateCaches", "RunStep", "RunStep"]
    assert life.of(actions.Resume)[-1].first


def test_time_in_which_it_served_gives_budget_back_and_time_in_which_it_hung_does_not() -> None:
    life = repaired(broken(now=1.0))
    assert life.group.policy.rebuilds.left == REBUILDS - 1
    life.now += 3.0
    life.fails(Evidence(Fault.STEP_FAILED, 1, "again", waited=1.0))
    assert life.group.policy.rebuilds.left == pytest.approx(REBUILDS - 2 + 2.0 / REBUILD_REFILL_SECONDS)


@pytest.mark.parametrize(("steps", "rung"), [(0, Rung.RESPAWN), (1, Rung.REBUILD), (2, Rung.REBUILD)])
def test_a_repair_after_which_no_step_was_done_has_not_helped(steps: int, rung: Rung) -> None:
    life = repaired(broken())
    life.done.clear()
    life.fails(FAILED, steps=steps)
    assert life.of(actions.ReportFault)[-1].decision.rung is rung


@pytest.mark.parametrize(
    ("cause", "serves", "reload"),
    [
        (HUNG, True, False),
        (HUNG, False, True),
        (Evidence(Fault.CONTEXT_FAULT, 1, "illegal address"), True, True),
        (Evidence(Fault.CONTEXT_FAULT, 1, "illegal address"), False, True),
    ],
)
def test_one_that_hung_in_a_step_need_not_reload_its_weights(cause: Evidence, serves: bool, reload: bool) -> None:
    life = GroupLife()
    life.serve()
    if not serves:
        life.fails(FAILED)
        life.left(0)
        life.left(1)
        assert stage(life) is Stage.ASSEMBLING
    life.done.clear()
    life.fails(cause)
    assert [(kill.rank, kill.reload) for kill in life.of(actions.Kill)] == [(1, reload)]


def test_a_first_forming_that_fails_is_no_fault_of_the_record_yet() -> None:
    life = GroupLife()
    life.gather()
    life.fails(FAILED, steps=0)
    assert [report.recorded for report in life.of(actions.ReportFault)] == [False]


def test_a_call_without_a_fault_of_its_own_counts_as_one_failure() -> None:
    life = GroupLife(fails_at_once=False)
    life.gather()
    life.exit_after_answering(1)
    due = life.group.next_deadline()
    assert due is not None
    assert due - life.now == pytest.approx(RETRY_SECONDS[1])


def test_what_is_overdue_is_done_at_the_next_look() -> None:
    life = GroupLife()
    life.serve()
    life.fails(FAILED, steps=0)
    assert stage(life) is Stage.PAUSING
    life.now += RETRY_SECONDS[1] + 0.7
    life.group.tick(life.now)
    assert stage(life) is Stage.GATHERING
    assert life.group.accepting_until is not None
    life.now += ACCEPTING_SECONDS
    assert any(isinstance(one, actions.StatusChanged) for one in life.group.tick(life.now))
    assert life.group.accepting_until is None


def test_ranks_that_know_of_a_later_epoch_have_left_this_one_too() -> None:
    life = broken()
    for rank in (0, 1):
        life.tell(events.RankReported(rank, bus.Aborted(epoch=life.group.epoch + 5, seconds=0.0)))
    assert stage(life) is Stage.ASSEMBLING


def test_a_process_that_has_seen_later_epochs_raises_the_group_s_unless_it_is_a_stranger() -> None:
    life = GroupLife()
    before = life.group.epoch
    newcomer = msgspec.structs.replace(life.hello(0, 1), epoch=before + 8)
    assert life.group.admit(newcomer) == bus.Welcome(epoch=before + 9)
    stranger = msgspec.structs.replace(newcomer, group=7, epoch=before + 90)
    assert isinstance(life.group.admit(stranger), bus.Refused)
    assert life.group.epoch == before + 9


def test_a_second_process_takes_the_place_of_one_that_is_still_connected() -> None:
    life = GroupLife(fails_at_once=False)
    life.serve()
    life.done.clear()
    life.connect(1)
    assert [one.evidence.message for one in life.of(actions.Accuse)] == [
        "rank 1 (pid 11) another process has taken its place"
    ]
    fresh = GroupLife()
    fresh.connect(1)
    assert fresh.of(actions.Log) == []


def test_how_a_process_ended_is_better_known_once_its_supervisor_has_seen_it() -> None:
    life = GroupLife()
    life.serve()
    life.done.clear()
    life.tell(events.RankDisconnected(1))
    life.exit(1)
    [refined] = life.of(actions.RefineFault)
    assert (refined.before, refined.message) == (
        "rank 1 (pid 11) lost its connection", "rank 1 (pid 11) was killed by SIGKILL"
    )  # fmt: skip
    connected = GroupLife()
    connected.serve()
    connected.exit(1)
    assert connected.of(actions.RefineFault) == []


def test_one_that_is_stopped_hangs_in_a_step_and_is_killed_on_the_way() -> None:
    life = GroupLife(fails_at_once=False)
    life.serve()
    life.done.clear()
    life.tell(events.RankStopped(1, "1.0", 11, "SIGSTOP"))  # not the current one
    assert life.done == []
    life.tell(events.RankStopped(1, life.name(1, 1), 11, "SIGSTOP"))
    [accused] = life.of(actions.Accuse)
    assert (accused.evidence.fault, accused.evidence.rank, accused.evidence.stragglers) == (Fault.HANG, 1, (1,))
    assert accused.evidence.outside
    apart = broken()
    apart.tell(events.RankStopped(1, apart.name(1, 1), 11, "SIGSTOP"))
    assert [(kill.rank, kill.reload) for kill in apart.of(actions.Kill)] == [(1, False)]
    assert [one.rank for one in apart.of(actions.NameCulprit)] == [1]


def test_a_poisoned_group_begins_anew_with_processes_that_reload() -> None:
    life = GroupLife(now=1.0)
    life.serve()
    life.done.clear()
    life.fails(Evidence(Fault.RANK_LOST, 1, "rank 1 has been away", final=True))
    assert stage(life) is Stage.POISONED
    life.group.handles[1].load_failure = LoadFailure.PERMANENT
    first = timing.POISONED_SECONDS[0]
    life.done.clear()
    life.wait(first)
    assert {(kill.rank, kill.reload, kill.reason) for kill in life.of(actions.Kill)} == {
        (rank, True, f"the group was poisoned for {first:g} s and tries again") for rank in (0, 1)
    }
    assert life.group.handles[1].load_failure is None


def test_caches_of_another_size_are_not_those_that_the_sequences_stand_in() -> None:
    life = broken()
    life.offers[1] = 20
    life.left(0)
    life.left(1)
    for _ in range(15):
        life.proceed(limit=3)
        life.wait(timing.ROOM_LOOK_SECONDS)
    life.proceed()
    resumed = life.of(actions.Resume)[-1]
    assert (resumed.blocks, resumed.kept, resumed.respawned) == (19, False, False)


def test_a_process_is_another_whatever_its_name_sorts_after() -> None:
    life = GroupLife()
    life.processes[1] = 4
    life.serve()
    life.exit(1)
    life.processes[1] = 1
    life.connect(1)
    life.loaded(1)
    life.left(0)
    life.proceed()
    assert life.of(actions.Resume)[-1].respawned


def test_the_first_time_it_is_poisoned_it_tries_again_soonest() -> None:
    life = GroupLife()
    life.gather()
    life.fails(Evidence(Fault.RANK_LOST, 1, "rank 1 is away", final=True), steps=0)
    assert stage(life) is Stage.POISONED
    assert life.group.next_deadline() == life.now + timing.POISONED_SECONDS[0]


def assemble_again(life: GroupLife) -> None:
    if stage(life) is Stage.PAUSING and (due := life.group.next_deadline()) is not None:
        life.wait(due - life.now)
    life.left(0)
    life.left(1)
    assert stage(life) is Stage.ASSEMBLING


def test_attempts_that_fail_for_longer_than_is_allowed_are_in_vain() -> None:
    broke = Evidence(Fault.RANK_LOST, None, "the collective broke")
    life = broken()
    assemble_again(life)
    first = life.now
    for seconds, poisoned in ((0.0, False), (HOST.attempts, False), (HOST.attempts + 20.0, True)):
        life.now = first + seconds
        life.fails(broke, steps=0, by_request=True)
        assert (stage(life) is Stage.POISONED) is poisoned
        if not poisoned:
            assemble_again(life)


@pytest.mark.parametrize(("spare", "killed"), [(0.5, [0]), (1e-6, [0]), (0.0, [0, 1]), (-0.5, [0, 1])])
def test_a_first_download_that_gets_further_goes_on_when_the_group_tries_again(spare: float, killed: list[int]) -> None:
    """`spare`: seconds that rank 1 could still be silent then."""
    life = GroupLife()
    for rank in (0, 1):
        life.pod(rank)
        life.connect(rank)
    while stage(life) is not Stage.POISONED:
        life.exit(0)
        life.connect(0)
    life.exit(0)
    due = life.group.next_deadline()
    assert due is not None
    allowed = life.group._timing.loading(0.0, has_served=False)
    life.group.handles[1].heard_at = due - allowed + spare
    life.done.clear()
    life.now = due
    life._do(life.group.tick(due))
    assert sorted(kill.rank for kill in life.of(actions.Kill)) == killed


def test_what_comes_too_late_or_is_of_no_process_that_is_known_changes_nothing() -> None:
    life = GroupLife()
    life.serve()
    life.done.clear()
    late = (events.ModelRead(), events.CallDone({}), events.RankExited(0, "of another life", 99, "was killed"))
    assert [life.tell(event) for event in late] == [[], [], []]
    assert stage(life) is Stage.SERVING


def test_a_group_that_serves_loads_as_long_as_the_api_reads_its_tokenizer() -> None:
    life = GroupLife()
    life.serve()
    found = group_state(life.group, life.now, draining=False, blocker="", loading="the api reads the tokenizer")
    assert found == (GroupState.LOADING, "all 2 ranks are in step; the api reads the tokenizer")


def test_while_pods_download_the_slowest_is_told() -> None:
    life = GroupLife()
    for rank, done in ((0, 3_000_000), (1, 1_000_000)):
        life.connect(rank)
        download = Download(done=done, total=10_000_000, percent=10, rate=5e6)
        report = bus.LoadProgress(bytes_done=0, bytes_total=0, bytes_moved=done, download=download)
        life.tell(events.RankReported(rank, report))
    found = group_state(life.group, life.now, draining=False, blocker="")
    assert found == (GroupState.LOADING, "1 of 10 MB of the model are downloaded")
    assert slowest_download(life.group.handles) == Download(done=1_000_000, total=10_000_000, percent=10, rate=5e6)
    life.tell(events.RankDisconnected(1))
    life.loaded(0)
    assert slowest_download(life.group.handles) is None


def test_a_pod_that_was_let_go_is_no_fault_and_its_successor_is_waited_for() -> None:
    life = GroupLife()
    life.serve()
    spent = life.group.policy.respawns.left
    life.done.clear()
    life.tell(events.PodReleased(1))
    life.exit(1, "exited with code 0")
    life.tell(events.PodDisconnected(1))
    text = "rank 1 (pid 11) has gone with its pod, which was asked to end"
    assert [one.message for one in life.of(actions.ReportDeparture)] == [text]
    life.left(0)
    life.wait(3600.0)
    assert stage(life) is Stage.GATHERING, "however long the cluster takes"
    told = "waiting for rank 1 of the pod in the place of the one that was asked to end; "
    assert state(life) == (GroupState.RECOVERING, f"{told}requests wait and will be resumed")
    assert not life.of(actions.ReportFault)
    assert life.group.policy.respawns.left == spent
    life.pod(1, "another")
    life.connect(1)
    life.loaded(1)
    life.proceed()
    assert stage(life) is Stage.SERVING
    life.exit(1)
    assert [one.cause.rank for one in life.of(actions.ReportFault)] == [1], "that of the next pod is one"


def test_a_pod_that_goes_while_the_group_is_formed_is_no_fault_either() -> None:
    life = GroupLife()
    life.gather()
    life.tell(events.PodReleased(1))
    life.exit_after_answering(1)
    assert len(life.of(actions.ReportDeparture)) == 1
    assert not life.of(actions.ReportFault)
