"""A member pod that is asked to end: its group drains as one, and is unready until it is whole again."""

from __future__ import annotations

import asyncio

from tests.support.fake_ranks import continuation
from tests.support.live_engine import LiveEngine, live_engine

from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.status import GroupState


def released(live: LiveEngine) -> int:
    return sum(isinstance(one, bus.Release) for one in live.told)


async def leave(live: LiveEngine, grace_seconds: float) -> None:
    await live.until(lambda: 1 in live.links and live.links[1].connected, "the pod is connected")
    live.links[1].send(bus.Leaving(grace_seconds=grace_seconds))


async def test_it_finishes_what_runs_before_the_pod_goes_and_takes_no_more_until_it_is_whole() -> None:
    async with live_engine() as live:
        running = asyncio.create_task(live.generate((1, 2), 240))
        await live.until(lambda: live.engine.stats().requests_running == 1, "it runs")
        await leave(live, 30.0)
        await live.until(lambda: not live.engine.readiness().ready, "the leader is unready")
        await live.until(lambda: not live.readiness[1][-1].accepting, "so are the others")
        assert live.engine.readiness().draining, "clients are to connect elsewhere"
        state, message = live.engine.status().state, live.engine.status().message
        assert (state, message) == (
            GroupState.DRAINING, "pod 1 of the group must end; running requests are being finished",
        )  # fmt: skip
        assert await running == continuation((1, 2), 240)
        await live.until(lambda: released(live) == 1, "the pod may go")
        await live.ranks[1].die()
        await live.unsupervised(1)
        await live.until(lambda: live.engine.status().state is GroupState.RECOVERING, "the rank is missed")
        assert not live.engine.status().accepting, "other groups serve meanwhile"
        waiting = asyncio.create_task(live.generate((3,), 5))
        live.supervise(1)
        await live.ranks[1].respawn(crashed=True)
        assert await waiting == continuation((3,), 5), "what came nevertheless has waited"
        await live.ready()
        assert live.engine.status().accepting
        told = live.engine.status()
        assert (told.faults, told.recoveries) == ([], 0), "it was no fault"
        await live.until(lambda: live.readiness[1][-1].whole and live.readiness[1][-1].accepting, "so it is told")


async def test_what_outlasts_the_grace_goes_on_with_the_next_pod() -> None:
    async with live_engine() as live:
        live.ranks[1].misdeed = lambda rank, step: None
        running = asyncio.create_task(live.generate((1, 2), 20))
        await live.until(lambda: live.engine.stats().requests_running == 1, "it runs")
        await leave(live, 2.0)
        await live.until(lambda: released(live) == 1, "the pod may go")
        assert not running.done()
        live.ranks[1].misdeed = None
        await live.ranks[1].respawn(crashed=True)
        assert await running == continuation((1, 2), 20)
        assert live.engine.status().faults == []


async def test_a_group_that_does_not_serve_has_nothing_to_finish() -> None:
    async with live_engine() as live:
        await live.ranks[1].die()
        waiting = asyncio.create_task(live.generate((1, 2), 5))
        await live.until(lambda: live.engine.status().state is GroupState.RECOVERING, "the rank is missed")
        await leave(live, 3600.0)
        await live.until(lambda: released(live) == 1, "the pod may go, though a request waits")
        assert live.engine.status().accepting, "as after any loss of a rank"
        await live.ranks[1].respawn(crashed=True)
        assert await waiting == continuation((1, 2), 5)
        assert len(live.engine.status().faults) == 1, "the rank was lost before anybody asked for its pod"


async def test_the_next_pod_s_ranks_are_missed_like_any_others() -> None:
    async with live_engine() as live:
        await leave(live, 3600.0)
        await live.until(lambda: released(live) == 1, "the pod may go")
        await live.ranks[1].die()
        await live.unsupervised(1)
        live.supervise(1)
        await live.ranks[1].respawn(crashed=True)
        await live.ready()
        assert live.engine.status().faults == []
        await live.ranks[1].respawn(crashed=True)
        await live.until(lambda: len(live.engine.status().faults) == 1, "this one's end is a fault")


async def test_a_pod_that_came_back_before_anybody_missed_it_leaves_no_trace() -> None:
    async with live_engine() as live:
        await leave(live, 3600.0)
        await live.until(lambda: live.engine.status().state is GroupState.DRAINING, "the group drains")
        await live.unsupervised(1)
        live.supervise(1)
        await live.until(lambda: bool(live.engine.status().accepting), "all ranks are in step, and nobody leaves")


async def test_where_clients_learn_late_the_pod_stays_for_as_long() -> None:
    async with live_engine(lame_duck_seconds=3.0) as live:
        await leave(live, 3.0)
        await live.until(lambda: live.engine.status().state is GroupState.DRAINING, "the group drains")
        assert await live.generate((1,), 3) == continuation((1,), 3), "what they still send is answered"
        assert not released(live)
        await live.until(lambda: released(live) == 1, "the grace bounds that, too")


async def test_a_member_that_leaves_with_the_leader_is_kept_until_the_drain_is_done() -> None:
    async with live_engine(grace_seconds=10.0) as live:
        await live.until(lambda: 1 in live.links and live.links[1].connected, "the pod is connected")
        running = asyncio.create_task(live.generate((1, 2), 240))
        await live.until(lambda: live.engine.stats().requests_running == 1, "it runs")
        live.links[1].send(bus.Leaving(grace_seconds=30.0))
        draining = asyncio.create_task(live.engine.drain())
        await asyncio.gather(running, draining)
        assert not [one for one in live.told if isinstance(one, bus.Release)]
        live.engine.release()
        await live.until(lambda: sum(isinstance(one, bus.Release) for one in live.told) == 2, "both are released")
