"""The engine over a real bus, with ranks that misbehave in every way: streams go on, tokens stay the same."""

from __future__ import annotations

import asyncio
import random

import msgspec
import pytest
from tests.support.fake_ranks import FakeRank, continuation
from tests.support.live_engine import live_engine, request

from lockstep_runtime.config import EngineLimits
from lockstep_runtime.engine.client import EngineBusyError, FinishReason, GenerationFailedError, RequestTooLongError
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.status import Fault, GroupState, RankState


def fails_once(rank: FakeRank, fault: Fault, message: str = "out of memory", *, after: int = 0) -> None:
    """One step of the rank fails: the next, or that after so many."""
    left = after

    def misdeed(self: FakeRank, step: bus.Step) -> bus.StepDone | bus.StepFailed:
        nonlocal left
        if left:
            left -= 1
            return self.compute(step)
        self.misdeed = None
        return bus.StepFailed(epoch=step.epoch, step=step.step, fault=fault, message=message)

    rank.misdeed = misdeed


async def test_concurrent_requests_get_the_right_tokens() -> None:
    async with live_engine() as live:
        prompts = [tuple(range(n, n + 1 + 5 * n)) for n in range(12)]
        answers = await asyncio.gather(*(live.generate(prompt, 10) for prompt in prompts))
        assert answers == [continuation(prompt, 10) for prompt in prompts]
        stats = live.engine.stats()
        assert (stats.requests_running, stats.requests_waiting, stats.kv_blocks_used) == (0, 0, 0)
        assert stats.steps_total > 0


async def test_more_than_the_cache_holds_is_preempted_and_not_refused() -> None:
    async with live_engine(cache_blocks=8) as live:
        prompts = [(n, n + 1, n + 2) for n in range(10)]
        answers = await asyncio.gather(*(live.generate(prompt, 25) for prompt in prompts))
        assert answers == [continuation(prompt, 25) for prompt in prompts]
        assert live.engine.stats().preemptions_total > 0


async def test_the_smallest_cache_of_the_ranks_counts() -> None:
    async with live_engine(start=False) as live:
        live.ranks[1].cache_blocks = 6  # one is the probe's
        for rank in live.ranks:
            rank.start()
        await live.ready()
        assert live.engine.stats().kv_blocks_total == 5
        assert live.engine.max_model_len == 20
        with pytest.raises(RequestTooLongError, match="18 tokens and up to 3 were asked for, 21 together; at most 20"):
            await live.generate(tuple(range(18)), 3)


@pytest.mark.parametrize("rank", [0, 1, 2])
async def test_a_lost_rank_is_a_pause_for_the_client(rank: int) -> None:
    async with live_engine(ranks=3) as live:
        running = [asyncio.create_task(live.generate((n, n), 200)) for n in range(4)]
        await live.until(lambda: live.ranks[rank].steps > 20, "some steps are done")
        await live.ranks[rank].respawn()
        assert await asyncio.gather(*running) == [continuation((n, n), 200) for n in range(4)]
        status = live.engine.status()
        [fault] = status.faults
        assert (fault.id, fault.fault, fault.rank, fault.rung) == (1, Fault.RANK_LOST, rank, "Respawn")
        assert fault.recovered_at is not None
        assert {"detect", "abort", "respawn", "rebuild", "firstToken"} <= fault.phases.keys()
        assert fault.requests_resumed == 4
        assert (status.recoveries, status.state) == (1, GroupState.READY)
        assert [one.respawns for one in status.ranks] == [int(one.rank == rank) for one in status.ranks]
        assert all(one.state is RankState.READY and one.epoch == status.epoch for one in status.ranks)


async def test_a_rank_lost_while_nothing_runs_is_noticed_and_repaired() -> None:
    async with live_engine() as live:
        await live.ranks[1].die()
        await live.until(lambda: live.engine.status().state is GroupState.RECOVERING, "the loss is noticed")
        assert "rank 1" in live.engine.status().message
        assert live.engine.readiness().ready
        await live.ranks[1].respawn()
        await live.ready()
        assert await live.generate((1,), 5) == continuation((1,), 5)


async def test_requests_that_come_during_a_recovery_wait() -> None:
    async with live_engine() as live:
        await live.ranks[0].die()
        await live.until(lambda: live.engine.status().state is GroupState.RECOVERING, "the loss is noticed")
        waiting = asyncio.create_task(live.generate((3, 4), 6))
        await live.until(lambda: live.engine.stats().requests_waiting == 1, "the request is queued")
        await live.ranks[0].respawn()
        assert await waiting == continuation((3, 4), 6)


@pytest.mark.parametrize("fault", [Fault.STEP_FAILED, Fault.NON_FINITE])
async def test_a_failed_step_is_repaired_with_every_process_kept(fault: Fault) -> None:
    async with live_engine() as live:
        fails_once(live.ranks[1], fault)
        assert await live.generate((5, 6), 20) == continuation((5, 6), 20)
        status = live.engine.status()
        suspect = None if fault is Fault.NON_FINITE else 1  # a NaN is in every rank's sum
        assert [(one.fault, one.rank, one.rung) for one in status.faults] == [(fault, suspect, "Rebuild")]
        assert "rank 1: out of memory" in status.faults[0].message
        assert [one.respawns for one in status.ranks] == [0, 0]


@pytest.mark.parametrize("fault", [Fault.STEP_FAILED, Fault.NON_FINITE, Fault.CORRUPTION])
async def test_what_was_computed_before_garbage_is_computed_again_and_nothing_else(fault: Fault) -> None:
    async with live_engine(cache_blocks=256) as live:
        fails_once(live.ranks[1], fault, after=10)
        assert await live.generate(tuple(range(100)), 20) == continuation(tuple(range(100)), 20)
        once = 100 + 20 - 1  # the last token is not fed
        if fault is Fault.CORRUPTION:
            assert live.ranks[0].fed > once + 100
        else:
            assert live.ranks[0].fed <= once + 1


async def test_a_nan_that_stands_in_a_cache_has_every_context_computed_again() -> None:
    def spoils(self: FakeRank, step: bus.Step) -> bus.StepFailed | bus.StepDone:
        if self.steps < 10:
            return self.compute(step)
        self.misdeed = None
        self.spoil_context(step)
        return bus.StepFailed(epoch=step.epoch, step=step.step, fault=Fault.NON_FINITE, message="NaN")

    async with live_engine(cache_blocks=256) as live:
        live.ranks[1].misdeed = spoils
        assert await live.generate(tuple(range(100)), 20) == continuation(tuple(range(100)), 20)
        assert live.ranks[0].fed > 100 + 20 + 100
        [fault] = live.engine.status().faults
        assert (fault.fault, fault.rank, fault.rung) == (Fault.NON_FINITE, 1, "Rebuild")
        assert "KV cache of rank 1" in fault.message


@pytest.mark.parametrize("crashed", [False, True])
async def test_a_killed_process_leaves_its_cache_to_the_next_and_one_that_crashed_does_not(*, crashed: bool) -> None:
    async with live_engine(cache_blocks=256) as live:
        running = asyncio.create_task(live.generate(tuple(range(100)), 300))
        await live.until(lambda: live.ranks[0].steps > 10, "some steps are done")
        await live.ranks[1].respawn(crashed=crashed)
        assert await running == continuation(tuple(range(100)), 300)
        assert (live.ranks[0].fed > 100 + 300 + 50) == crashed


async def test_an_unusable_context_costs_that_process_and_no_other() -> None:
    async with live_engine() as live:
        fails_once(live.ranks[1], Fault.CONTEXT_FAULT, "illegal address")
        assert await live.generate((5, 6), 20) == continuation((5, 6), 20)
        assert [one.respawns for one in live.engine.status().ranks] == [0, 1]
        assert live.kills() == [(1, True)]


async def test_no_token_of_a_desynchronised_step_gets_out() -> None:
    def odd(self: FakeRank, step: bus.Step) -> bus.StepDone:
        self.misdeed = None
        honest = self.compute(step)
        return msgspec.structs.replace(
            honest,
            fingerprint=honest.fingerprint ^ 1,
            sampled=[msgspec.structs.replace(one, token=one.token ^ 1) for one in honest.sampled],
        )

    async with live_engine(ranks=3) as live:
        live.ranks[0].misdeed = odd
        assert await live.generate((5, 6), 20) == continuation((5, 6), 20)
        [fault] = live.engine.status().faults
        assert (fault.fault, fault.rank) == (Fault.DESYNC, 0)


async def test_the_cause_is_named_and_not_the_peer_that_suffered_from_it() -> None:
    def suffers(self: FakeRank, step: bus.Step) -> bus.StepFailed:
        self.misdeed = None
        return bus.StepFailed(epoch=step.epoch, step=step.step, fault=Fault.RANK_LOST, message="gloo: closed")

    def dies(self: FakeRank, step: bus.Step) -> None:
        self.misdeed = None
        asyncio.get_running_loop().call_later(0.05, lambda: spawned.append(asyncio.create_task(self.respawn())))

    spawned: list[asyncio.Task[None]] = []
    async with live_engine() as live:
        live.ranks[0].misdeed, live.ranks[1].misdeed = suffers, dies
        assert await live.generate((5, 6), 20) == continuation((5, 6), 20)
        [fault] = live.engine.status().faults
        assert (fault.fault, fault.rank) == (Fault.RANK_LOST, 1)


async def test_a_request_that_breaks_every_step_is_given_up_and_the_others_go_on() -> None:
    poison = 13_000_000

    def choke(self: FakeRank, step: bus.Step) -> bus.StepDone | bus.StepFailed:
        if any(poison in part.tokens for part in step.sequences):
            return bus.StepFailed(epoch=step.epoch, step=step.step, fault=Fault.STEP_FAILED, message="bad input")
        return self.compute(step)

    async with live_engine() as live:
        live.ranks[1].misdeed = choke
        bad = asyncio.create_task(live.generate((1, poison), 5))
        good = [asyncio.create_task(live.generate((n,), 30)) for n in range(5)]
        with pytest.raises(GenerationFailedError, match="rank 1: bad input"):
            await bad
        assert await asyncio.gather(*good) == [continuation((n,), 30) for n in range(5)]
        assert live.engine.status().recoveries == 2


async def test_what_became_of_the_process_is_in_the_fault() -> None:
    async with live_engine() as live:
        await live.until(lambda: 1 in live.links and live.links[1].connected, "the pod is connected")
        lost = live.ranks[1].incarnation
        await live.ranks[1].die()
        live.links[1].send(bus.ProcessExited(rank=1, pid=1001, incarnation=lost, signal=9))
        await live.until(lambda: "SIGKILL" in str(live.engine.status().faults), "the exit is told")
        [fault] = live.engine.status().faults
        assert fault.message == "rank 1 (pid 1001) was killed by SIGKILL"
        await live.ranks[1].respawn()
        await live.ready()


async def test_random_faults_in_every_rank_change_no_token() -> None:
    chance = random.Random(7)

    def sometimes(self: FakeRank, step: bus.Step) -> bus.StepDone | bus.StepFailed | None:
        dice = chance.random()
        if dice < 0.01:
            return bus.StepFailed(epoch=step.epoch, step=step.step, fault=Fault.STEP_FAILED, message="by chance")
        if dice < 0.02:
            respawns.append(asyncio.create_task(self.respawn()))
            return None
        return self.compute(step)

    respawns: list[asyncio.Task[None]] = []
    async with live_engine(ranks=3, cache_blocks=24) as live:
        for rank in live.ranks:
            rank.misdeed = sometimes
        prompts = [tuple(range(n, 2 * n + 1)) for n in range(8)]
        answers = await asyncio.gather(*(live.generate(prompt, 40) for prompt in prompts))
        assert answers == [continuation(prompt, 40) for prompt in prompts]
        faults = live.engine.status().faults
        assert len(faults) >= 3
        assert [one.id for one in faults] == list(range(faults[0].id, faults[0].id + len(faults)))


async def test_closing_a_stream_cancels_its_request() -> None:
    async with live_engine() as live:
        stream = live.engine.generate(request((1, 2), 200))
        assert (await anext(stream)).token.token == continuation((1, 2), 1)[0]
        await stream.aclose()
        assert live.engine.stats().kv_blocks_used == 0
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_cancelling_the_reader_cancels_its_request() -> None:
    async with live_engine() as live:
        reader = asyncio.create_task(live.generate((1, 2), 240))
        await live.until(lambda: live.engine.stats().requests_running == 1, "it runs")
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        assert live.engine.stats().requests_running == 0
        assert live.engine.stats().kv_blocks_used == 0


async def test_dropping_a_stream_cancels_its_request() -> None:
    async with live_engine() as live:
        live.ranks[1].misdeed = lambda rank, step: None  # so that it does not end by itself
        stream = live.engine.generate(request((1, 2), 240))
        await live.until(lambda: live.engine.stats().requests_running == 1, "it runs")
        del stream
        assert (live.engine.stats().requests_running, live.engine.stats().kv_blocks_used) == (0, 0)


async def test_a_stop_token_is_delivered_with_its_reason() -> None:
    wanted = continuation((9,), 5)
    async with live_engine() as live:
        events = [event async for event in live.engine.generate(request((9,), 50, frozenset({wanted[3]})))]
        assert [event.token.token for event in events] == wanted[:4]
        assert [event.finish for event in events] == [None, None, None, FinishReason.STOP]


async def test_a_full_queue_turns_requests_away() -> None:
    async with live_engine(limits=EngineLimits(max_sequences=1, max_waiting=2)) as live:
        held = [live.engine.generate(request((1,), 200)) for _ in range(2)]
        await live.until(lambda: live.engine.stats().requests_running == 1, "one runs")
        held.append(live.engine.generate(request((1,), 200)))
        with pytest.raises(EngineBusyError, match="2 requests are waiting already") as refusal:
            await live.generate((1,), 1)
        assert refusal.value.retry_after > 0
        for stream in held:
            await stream.aclose()
        assert await live.generate((1,), 1) == continuation((1,), 1)


async def test_before_the_model_is_loaded_requests_are_turned_away() -> None:
    async with live_engine(start=False) as live:
        assert not live.engine.readiness().ready
        with pytest.raises(EngineBusyError, match="waiting for ranks 0, 1 to connect"):
            await live.generate((1,), 1)


async def test_a_load_failure_is_told_in_the_workers_own_words_until_it_is_mended() -> None:
    async with live_engine(start=False) as live:
        live.ranks[1].load_error = "model.safetensors lacks the tensor norm.weight"
        for rank in live.ranks:
            rank.start()
        await live.until(lambda: live.engine.status().state is GroupState.FAILED, "the failure is told")
        assert live.engine.status().message == "model.safetensors lacks the tensor norm.weight"
        assert live.engine.status().may_pass, "the fake rank calls its failure transient"
        assert not live.engine.readiness().ready
        await live.ranks[1].die()
        assert live.engine.status().state is GroupState.FAILED
        live.ranks[1].load_error = ""
        await live.ranks[1].respawn()
        await live.ready()
        assert live.engine.status().faults == []


async def test_draining_finishes_what_runs_and_refuses_what_comes() -> None:
    async with live_engine(grace_seconds=10.0) as live:
        running = asyncio.create_task(live.generate((1, 2), 100))
        await live.until(lambda: live.engine.stats().requests_running == 1, "it runs")
        draining = asyncio.create_task(live.engine.drain())
        await live.until(lambda: not live.engine.readiness().ready, "it is unready")
        await asyncio.sleep(0)
        with pytest.raises(EngineBusyError, match="shutting down"):
            await live.generate((1,), 1)
        assert await running == continuation((1, 2), 100)
        await draining
        assert live.engine.status().state is GroupState.DRAINING


async def test_a_client_whose_stream_outlives_the_lame_duck_time_may_ask_once_more() -> None:
    async with live_engine(grace_seconds=30.0, lame_duck_seconds=0.05) as live:
        running = asyncio.create_task(live.generate((1, 2), 100))
        await live.until(lambda: live.engine.stats().requests_running == 1, "it runs")
        draining = asyncio.create_task(live.engine.drain())
        await live.until(lambda: not live.engine.readiness().ready, "it is unready")
        assert await running == continuation((1, 2), 100)
        assert await live.generate((3,), 5) == continuation((3,), 5)
        await draining
        with pytest.raises(EngineBusyError, match="shutting down"):
            await live.generate((1,), 1)


async def test_a_drain_takes_no_requests_in_the_second_half_of_its_grace() -> None:
    async with live_engine(grace_seconds=2.0, lame_duck_seconds=0.05) as live:
        live.ranks[1].misdeed = lambda rank, step: None
        running = asyncio.create_task(live.generate((1, 2), 100))
        await live.until(lambda: live.engine.stats().requests_running == 1, "it runs")
        draining = asyncio.create_task(live.engine.drain())
        asked: list[asyncio.Task[object]] = []

        async def refused() -> bool:
            asked.append(asyncio.create_task(live.generate((1,), 1)))
            await asyncio.sleep(0.05)
            return asked[-1].done() and isinstance(asked[-1].exception(), EngineBusyError)

        while not await refused():
            assert not draining.done()
        await draining
        for one in (running, *asked):
            with pytest.raises((GenerationFailedError, EngineBusyError), match="shutting down"):
                await one


async def test_what_outlasts_the_grace_fails_with_a_reason() -> None:
    async with live_engine(grace_seconds=0.05) as live:
        live.ranks[1].misdeed = lambda rank, step: None
        running = asyncio.create_task(live.generate((1, 2), 100))
        await live.until(lambda: live.engine.stats().requests_running == 1, "it runs")
        await live.engine.drain()
        with pytest.raises(GenerationFailedError, match="shutting down"):
            await running


async def test_the_epoch_rises_above_what_members_have_seen_under_another_engine() -> None:
    async with live_engine(start=False) as live:
        live.ranks[1].epoch = 41
        for rank in live.ranks:
            rank.start()
        await live.ready()
        assert live.engine.status().epoch > 41
        assert await live.generate((1,), 3) == continuation((1,), 3)


async def test_a_restarted_engine_goes_on_with_ids_and_epochs() -> None:
    async with live_engine() as live:
        await live.ranks[0].respawn()
        await live.until(lambda: live.engine.status().recoveries == 1, "it is repaired")
        before = live.engine.status()
    async with live_engine(history=before) as live:
        assert live.engine.status().epoch > before.epoch
        await live.ranks[1].respawn()
        await live.until(lambda: live.engine.status().recoveries == 2, "it is repaired")
        assert [one.id for one in live.engine.status().faults] == [1, 2]


async def test_answers_of_an_older_epoch_are_dropped() -> None:
    async with live_engine() as live:
        rank = live.ranks[1]
        stale = bus.StepFailed(epoch=rank.epoch - 1, step=1, fault=Fault.STEP_FAILED, message="from the past")
        rank.send(stale)
        assert await live.generate((1,), 5) == continuation((1,), 5)
        assert live.engine.status().faults == []


async def test_a_replaced_process_is_refused_for_good() -> None:
    async with live_engine() as live:
        old = live.ranks[1].incarnation
        await live.ranks[1].respawn()
        await live.until(lambda: live.engine.status().recoveries == 1, "it is repaired")
        ghost = FakeRank(live.config, 1, incarnation=old)
        ghost.start()
        assert isinstance(live.engine.group.admit(ghost.hello()), bus.Refused)
        assert await live.generate((1,), 5) == continuation((1,), 5)
        await ghost.die()
        assert live.engine.status().recoveries == 1


async def test_status_reports_follow_changes_and_are_quiet_otherwise() -> None:
    async with live_engine() as live:
        await live.until(lambda: bool(live.reports) and live.reports[-1].state is GroupState.READY, "it is reported")
        await asyncio.sleep(0)
        count = len(live.reports)
        for _ in range(3):
            await live.generate((1,), 30)
        assert len(live.reports) - count <= 2  # latencies wait for a second
        await live.until(lambda: live.reports[-1].step_latency.p50_ms is not None, "latencies are reported")
        assert all(rank.step_latency.p50_ms == 1.0 for rank in live.reports[-1].ranks)
        assert live.reports[-1].last_step_at is not None


async def test_what_keeps_the_api_from_answering_is_the_groups_state_until_it_is_taken_back() -> None:
    async with live_engine() as live:
        assert live.engine.status().accepting
        live.engine.set_serving_blocker("tokenizer.json: not JSON")
        status = live.engine.status()
        assert (status.state, status.message, status.accepting) == (
            GroupState.FAILED, "tokenizer.json: not JSON", False,
        )  # fmt: skip
        assert not live.engine.readiness().ready
        with pytest.raises(EngineBusyError, match="not JSON"):
            await live.generate((1,), 1)
        assert status.may_pass is False
        live.engine.set_serving_blocker("the hub does not answer", may_pass=True)
        assert live.engine.status().may_pass
        live.engine.set_serving_blocker("")
        await live.ready()
        assert await live.generate((1,), 5) == continuation((1,), 5)


async def test_a_load_that_can_not_succeed_poisons_a_group_that_has_served_at_once() -> None:
    async with live_engine() as live:
        live.ranks[1].load_error, live.ranks[1].load_failure = "no such kernel", bus.LoadFailure.PERMANENT
        await live.ranks[1].respawn()
        await live.until(lambda: live.engine.status().state is GroupState.POISONED, "it is poisoned")
        status = live.engine.status()
        assert status.message == "rank 1 can't load: no such kernel"
        assert (status.faults[-1].rank, status.accepting) == (1, False)


async def test_a_lost_device_poisons_the_group_at_its_first_start() -> None:
    async with live_engine(start=False) as live:
        live.ranks[1].load_error, live.ranks[1].load_failure = "no device", bus.LoadFailure.DEVICE_LOST
        for rank in live.ranks:
            rank.start()
        await live.until(lambda: live.engine.status().state is GroupState.POISONED, "it is poisoned")
        [fault] = live.engine.status().faults
        assert (fault.fault, fault.rank) == (Fault.CONTEXT_FAULT, 1)


async def test_a_process_whose_place_another_takes_loses_its_connection_and_is_refused() -> None:
    async with live_engine() as live:
        ghost = msgspec.structs.replace(live.ranks[1].hello(), pid=2001)
        old = live.ranks[1]
        live.ranks[1] = FakeRank(live.config, 1)
        live.ranks[1].start()
        await live.until(lambda: old.closed, "the old process is cut off")
        await live.until(lambda: live.engine.status().recoveries == 1, "the new one serves")
        assert isinstance(live.engine.group.admit(ghost), bus.Refused)
        assert await live.generate((1,), 5) == continuation((1,), 5)
        await old.die()
