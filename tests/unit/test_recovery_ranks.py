"""What the group knows of a rank and of its processes, event by event."""

from __future__ import annotations

import pytest

from lockstep_runtime.config import ServeConfig
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.bus import LoadFailure
from lockstep_runtime.protocol.status import Latency, RankState, RankStatus
from lockstep_runtime.recovery import actions
from lockstep_runtime.recovery.events import RankExited, RankStopped
from lockstep_runtime.recovery.membership import Membership
from lockstep_runtime.recovery.rank_handle import REPLACED_KEPT, RankHandle

OTHERS = ("1.0", "1.2")  # incarnations that sort before and after HERE
HERE = "1.1"


def hello(incarnation: str = HERE, epoch: int = 0, role: bus.Role = bus.Role.WORKER, rank: int = 1) -> bus.Hello:
    return bus.Hello(
        protocol=1, token="", role=role, group=0, pod_index=1, pod="pod-1", node="n1", pid=11, incarnation=incarnation,
        epoch=epoch, rank=rank,
    )  # fmt: skip


def loaded(size: int = 10) -> bus.Loaded:
    return bus.Loaded(seconds=1.25, weight_bytes=size, read_bytes=size, cache_blocks=4, block_size=4, memory_bytes=5)


def failed(words: str) -> bus.LoadFailed:
    return bus.LoadFailed(message=words, kind=LoadFailure.TRANSIENT)


def progress(done: int, total: int = 10, moved: int = 0) -> bus.LoadProgress:
    return bus.LoadProgress(bytes_done=done, bytes_total=total, bytes_moved=moved)


def arrived(incarnation: str = HERE, epoch: int = 3, now: float = 10.0) -> RankHandle:
    handle = RankHandle(rank=1, pod_index=1)
    handle.arrive(hello(incarnation), epoch, now)
    return handle


# --- a handle


def test_of_a_rank_that_was_never_there_nothing_is_known() -> None:
    handle = RankHandle(rank=1, pod_index=2)
    assert handle.status() == RankStatus(
        rank=1, pod_index=2, state=RankState.ABSENT, pod="", node="", pid=0, incarnation="", epoch=0, respawns=0,
        last_step=-1, last_step_at=None, memory_bytes=0, load_bytes_done=0, load_bytes_total=0, message="",
    )  # fmt: skip
    assert (handle.idle_epoch, handle.arrived_epoch, handle.welcome_epoch, handle.furthest) == (-1, -1, 0, 0)
    dues = (handle.abort_due(1), handle.reconnect_due(1), handle.death_due(1), handle.stall_due(1))
    assert dues == (None, None, None, None)
    assert (handle.absent_due(5.0, begun=2.0), handle.stuck_due(5.0)) == (7.0, 5.0)


def test_a_process_that_connects_is_shown_and_not_yet_idle() -> None:
    status, handle = arrived().status(), arrived()
    assert (status.pod, status.node, status.pid, status.incarnation) == ("pod-1", "n1", 11, HERE)
    assert (status.state, status.respawns) == (RankState.STARTING, 0)
    assert (handle.welcome_epoch, handle.arrived_epoch, handle.idle_epoch) == (3, 3, -1)
    assert handle.past_incarnations == {}


@pytest.mark.parametrize("other", OTHERS)
def test_another_process_replaces_the_one_before_and_the_same_one_only_comes_back(other: str) -> None:
    handle = arrived()
    handle.set_progress(progress(5), 11.0)
    handle.stepped(bus.StepDone(epoch=1, step=7, seconds=0.5, fingerprint=1), at=100.0)
    handle.leave("rank 1 went", 12.0)
    handle.arrive(hello(), 4, 13.0)
    status = handle.status()
    assert (status.respawns, status.load_bytes_done, status.load_bytes_total) == (0, 5, 10)
    assert (status.step_latency.p50_ms, status.last_step, status.last_step_at) == (500.0, 7, 100.0)
    handle.arrive(hello(other), 5, 14.0)
    status = handle.status()
    assert (status.respawns, status.load_bytes_done, status.load_bytes_total) == (1, 0, 0)
    assert status.step_latency == Latency()
    assert list(handle.past_incarnations) == [HERE]


def test_the_newest_of_the_replaced_are_kept() -> None:
    handle = RankHandle(rank=1, pod_index=1)
    for number in range(REPLACED_KEPT + 3):
        handle.arrive(hello(f"1.{number}"), 1, 1.0)
        assert len(handle.past_incarnations) == min(number, REPLACED_KEPT)
    assert list(handle.past_incarnations) == [f"1.{number}" for number in range(2, REPLACED_KEPT + 2)]


def test_what_counts_as_getting_further_with_the_weights() -> None:
    handle = arrived(now=10.0)
    handle.begin_forming(9.0)
    assert (handle.furthest, handle.furthest_at, handle.heard_at) == (0, 9.0, 10.0)
    for now, said, heard, furthest in [
        (11.0, progress(0, total=0), 10.0, (0, 9.0)),
        (12.0, progress(5), 12.0, (5, 12.0)),
        (13.0, progress(5), 12.0, (5, 12.0)),
        (14.0, progress(4), 14.0, (5, 12.0)),  # it began anew
        (15.0, progress(4), 14.0, (5, 12.0)),
        (16.0, progress(4, moved=7), 16.0, (7, 16.0)),  # it downloads
        (17.0, progress(4, moved=7), 16.0, (7, 16.0)),
        (18.0, progress(4, moved=6), 16.0, (7, 16.0)),
        (19.0, progress(6), 19.0, (7, 16.0)),
    ]:
        handle.set_progress(said, now)
        assert (handle.heard_at, (handle.furthest, handle.furthest_at)) == (heard, furthest)
        assert handle.state is (RankState.LOADING if said.bytes_total else RankState.STARTING)
    assert handle.stuck_due(5.0) == 21.0


def test_why_a_load_failed_is_news_once_and_stays_until_a_process_gets_further() -> None:
    handle = arrived()
    handle.set_progress(progress(5), 11.0)
    said = [handle.set_failed(failed(words)) for words in ("b", "b", "a", "c", "c")]
    assert said == [True, False, True, True, False]
    handle.leave("rank 1 went", 12.0)
    assert (handle.state, handle.message) == (RankState.FAILED, "c")
    handle.arrive(hello("1.2"), 3, 13.0)
    for done, state in ((3, RankState.FAILED), (5, RankState.FAILED), (6, RankState.LOADING)):
        handle.set_progress(progress(done), 14.0)
        assert handle.state is state
    assert handle.message == ""
    handle.arrive(hello("1.3"), 3, 15.0)
    assert handle.set_failed(failed("c"))
    for done, state in ((4, RankState.FAILED), (6, RankState.LOADING)):
        handle.set_progress(progress(done), 16.0)
        assert handle.state is state
    handle.set_loaded(loaded())
    assert (handle.state, handle.message, handle.load_failure) == (RankState.LOADED, "", None)
    handle.arrive(hello("1.4"), 3, 17.0)
    handle.set_failed(failed("d"))
    handle.set_progress(progress(1), 18.0)
    assert handle.state is RankState.LOADING


def test_of_a_load_that_failed_before_its_first_byte_the_first_byte_is_further() -> None:
    handle = arrived()
    handle.set_failed(failed("no such file"))
    handle.set_progress(progress(1), 12.0)
    assert handle.state is RankState.LOADING


def test_a_rank_is_idle_from_the_epoch_on_that_it_knows_of() -> None:
    handle = arrived(epoch=4)
    handle.set_aborted(9)
    assert (handle.idle_epoch, handle.state) == (-1, RankState.STARTING)
    handle.set_loaded(loaded(10))
    status = handle.status()
    assert (handle.idle_epoch, status.memory_bytes, status.load_bytes_done, status.load_bytes_total) == (4, 5, 10, 10)
    for epoch, idle in ((6, 6), (5, 6)):
        handle.abort_sent_at = 20.0
        handle.set_aborted(epoch)
        assert (handle.idle_epoch, handle.abort_due(1.5), handle.state) == (idle, None, RankState.LOADED)
    handle.leave("rank 1 went", 30.0)
    assert (handle.idle_epoch, handle.loaded, handle.state) == (-1, None, RankState.ABSENT)
    assert handle.message == "rank 1 went"


@pytest.mark.parametrize("other", OTHERS)
def test_a_kill_concerns_one_process(other: str) -> None:
    handle = arrived()
    handle.set_killed(other, 20.0)
    assert (handle.death_due(3.0), handle.stall_due(15.0)) == (None, 25.0)
    handle.set_loaded(loaded())
    handle.abort_sent_at = 21.0
    handle.set_killed(other, 22.0)
    assert (handle.idle_epoch, handle.abort_due(1.5)) == (3, 22.5)
    handle.set_killed(HERE, 23.0)
    assert (handle.idle_epoch, handle.abort_due(1.5), handle.loaded) == (-1, None, None)
    assert (handle.death_due(3.0), handle.stall_due(15.0)) == (26.0, None)


def test_one_whose_connection_is_lost_is_waited_for_unless_its_end_is_known() -> None:
    handle = arrived()
    assert (handle.reconnect_due(5.0), handle.absent_due(60.0, begun=2.0)) == (None, None)
    handle.leave("rank 1 went", 50.0)
    assert handle.reconnect_due(5.0) == 55.0
    assert (handle.absent_due(60.0, begun=2.0), handle.absent_due(60.0, begun=70.0)) == (110.0, 130.0)
    handle.ended = HERE
    assert handle.reconnect_due(5.0) is None
    handle.ended, handle.being_killed = "", HERE
    assert handle.reconnect_due(5.0) is None


# --- all of them


def membership(ranks: int = 2, per_pod: int = 1) -> Membership:
    members = Membership(ServeConfig(model="toy", served_name="toy", tensor_parallel_size=ranks, ranks_per_pod=per_pod))
    members.handles[1].arrive(hello(), 3, 10.0)
    return members


def test_ranks_belong_to_pods_in_their_order() -> None:
    assert [handle.pod_index for handle in membership(4, per_pod=2).handles] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("peer", "welcome"),
    [
        (hello(epoch=7), 7),
        (hello(epoch=1), 3),
        (hello("1.0", epoch=7), 8),
        (hello("1.2", epoch=7), 8),
        (hello(epoch=7, role=bus.Role.SUPERVISOR, rank=-1), 8),
    ],
)
def test_the_epoch_rises_above_what_another_engine_gave(peer: bus.Hello, welcome: int) -> None:
    assert membership().admit(peer, epoch=3) == bus.Welcome(epoch=welcome)


def test_a_closed_connection_is_told_with_the_process_it_was_of() -> None:
    members = membership()
    assert members.left(members.handles[1], "went", 20.0) == "rank 1 (pid 11) went"
    assert members.left(members.handles[0], "went", 20.0) == "rank 0 (pid 0) went"


@pytest.mark.parametrize("other", OTHERS)
def test_only_the_current_process_s_end_counts(other: str) -> None:
    members, exited = membership(), RankExited(1, HERE, 11, "was killed by SIGKILL")
    assert members.exited(RankExited(1, other, 12, "ended"), epoch=3) is None
    assert [found.early for epoch in (2, 3, 4) if (found := members.exited(exited, epoch))] == [True, True, False]
    members.handles[1].being_killed = other
    found = members.exited(exited, epoch=3)
    assert found is not None
    assert (found.message, found.loss, found.was_connected) == ("rank 1 (pid 11) was killed by SIGKILL", "", True)
    assert found.early
    members.handles[1].being_killed = HERE
    members.left(members.handles[1], "went", 20.0)
    found = members.exited(exited, epoch=3)
    assert found is not None
    assert (found.loss, found.was_connected, found.early) == ("rank 1 (pid 11) went", False, False)


def test_a_process_that_is_stopped_is_told_of_if_it_is_or_may_be_the_current_one() -> None:
    members = membership()

    def told(incarnation: str) -> bool:
        return members.stopped(RankStopped(1, incarnation, 11, "SIGSTOP")) != ""

    assert [told(one) for one in ("1.0", HERE, "1.2")] == [False, True, False]
    members.left(members.handles[1], "went", 20.0)
    assert [told(one) for one in ("1.0", HERE, "1.2")] == [True, True, True]
    members.handles[1].arrive(hello("1.2"), 3, 21.0)
    members.left(members.handles[1], "went", 22.0)
    assert not told(HERE)
    assert members.stopped(RankStopped(1, "1.2", 11, "SIGSTOP")) == "rank 1 (pid 11) was stopped by SIGSTOP"


def test_what_is_worth_a_line_of_a_load() -> None:
    members = membership()
    handle = members.handles[1]
    words = "rank 1 has its weights: 2500000.5 MB in 1.25 s"
    assert members.reported(handle, loaded(2_500_000_500_000), 11.0) == actions.Log(words, quiet=True, rank=1)
    log = members.reported(handle, failed("no disk"), 12.0)
    assert log is not None
    assert (log.message, log.quiet) == (f"rank 1 can't load ({LoadFailure.TRANSIENT}): no disk", False)
    assert members.reported(handle, failed("no disk"), 13.0) is None


def test_one_that_gets_further_is_heard_for_those_of_its_pod_that_have_not_begun() -> None:
    members = membership(6, per_pod=2)
    for rank, handle in enumerate(members.handles):
        handle.arrive(hello(f"{rank}.1", rank=rank), 3, 10.0)
    members.reported(members.handles[2], progress(5), 20.0)
    assert [handle.heard_at for handle in members.handles] == [10.0, 10.0, 20.0, 20.0, 10.0, 10.0]
    members.reported(members.handles[2], progress(5), 21.0)  # the same again is nothing new
    assert (members.handles[2].heard_at, members.handles[3].heard_at) == (20.0, 20.0)
    members.reported(members.handles[3], progress(1), 22.0)
    members.reported(members.handles[2], progress(6), 23.0)
    assert members.handles[3].heard_at == 22.0  # it loads by itself


def test_who_is_told_of_an_epoch() -> None:
    members = membership()
    assert members.send_aborts(3, 20.0) == []
    members.handles[1].welcome_epoch = 5
    assert members.send_aborts(4, 20.0) == []
    assert members.send_aborts(6, 20.0) == [actions.SendAbort(1, 6)]
    assert members.handles[1].abort_sent_at is None  # it is in no collective
    members.handles[1].set_loaded(loaded())
    members.send_aborts(7, 21.0)
    assert members.handles[1].abort_sent_at == 21.0


def test_only_a_known_process_of_a_pod_that_is_there_can_be_killed() -> None:
    members = membership()
    stranger, known = members.handles
    assert members.kill(known, "late", 20.0) is None
    members._pods = {0: "s0", 1: "s1"}
    assert members.kill(stranger, "late", 20.0) is None
    assert members.kill(stranger, "late", 20.0, "0.1") == actions.Kill(0, "0.1", "late", True)
    assert members.kill(known, "late", 20.0) == actions.Kill(1, HERE, "late", True)
    assert members.kill(known, "late", 20.0, reload=False) == actions.Kill(1, HERE, "late", False)
