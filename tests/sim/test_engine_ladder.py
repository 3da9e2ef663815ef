"""The ladder over a real bus: who hangs, what is tried, what is proved, and when the group gives up."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable

import pytest
from tests.support.fake_ranks import FakeRank, continuation
from tests.support.live_engine import LiveEngine, live_engine

from lockstep_runtime.config import Watchdog
from lockstep_runtime.engine.client import EngineBusyError, GenerationFailedError
from lockstep_runtime.log import fields_of
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.status import Fault, FaultRecord, GroupState
from lockstep_runtime.recovery import timing

HASTY = Watchdog(step_timeout=0.3)
PROMPT, ANSWER = (5, 6), 20


def silence(*stands: tuple[int, bool]) -> Callable[[FakeRank, bus.Step], None]:
    """The rank stops once, in this collective, inside of it or after it."""

    def misdeed(self: FakeRank, step: bus.Step) -> None:
        self.misdeed = None
        self.stands = stands[0] if stands else (1, True)

    return misdeed


async def the_fault(live: LiveEngine) -> FaultRecord:
    """The one that the answer met, which has the right tokens all the same."""
    assert await live.generate(PROMPT, ANSWER) == continuation(PROMPT, ANSWER)
    [fault] = live.engine.status().faults
    return fault


def respawns(live: LiveEngine) -> list[int]:
    return [rank.respawns for rank in live.engine.status().ranks]


async def test_a_rank_that_never_comes_to_the_collective_is_named_and_replaced() -> None:
    async with live_engine(ranks=3, watchdog=HASTY) as live:
        live.ranks[0].misdeed = live.ranks[2].misdeed = silence((7, True))
        live.ranks[1].misdeed = silence((6, False))
        fault = await the_fault(live)
        assert (fault.fault, fault.rank, fault.rung) == (Fault.HANG, 1, "Respawn")
        assert "rank 1 stopped before layers.7.mlp.down_proj, ranks 0,2 waited 0." in fault.message
        assert fault.phases["detect"] == pytest.approx(0.3, abs=0.2)
        assert respawns(live) == [0, 1, 0]
        assert live.kills() == [(1, False)]


async def test_one_that_hangs_again_before_it_was_of_use_is_loaded_again() -> None:
    hangs = [(6, False), (6, False)]

    def stop(self: FakeRank, step: bus.Step) -> bus.StepDone | None:
        if not hangs:
            return self.compute(step)
        self.stands = hangs.pop()
        return None

    async with live_engine(watchdog=HASTY) as live:
        live.ranks[0].misdeed = silence((7, True))
        live.ranks[1].misdeed = stop
        fault = await the_fault(live)
        assert (fault.fault, fault.rank, fault.rung) == (Fault.HANG, 1, "Respawn")
        assert live.kills() == [(1, False), (1, True)]


async def test_ranks_that_all_wait_in_one_collective_are_aborted_and_kept() -> None:
    async with live_engine(watchdog=HASTY) as live:
        for rank in live.ranks:
            rank.misdeed = silence((3, True))
        fault = await the_fault(live)
        assert (fault.fault, fault.rank, fault.rung) == (Fault.HANG, None, "Rebuild")
        assert "ranks 0,1 all stopped in layers.3.mlp.down_proj, none behind the others" in fault.message
        assert respawns(live) == [0, 0]


async def test_one_that_does_not_answer_the_abort_either_is_killed() -> None:
    def freeze(self: FakeRank, step: bus.Step) -> None:
        self.misdeed, self.deaf = None, True

    async with live_engine(watchdog=HASTY) as live:
        live.ranks[0].misdeed, live.ranks[1].misdeed = silence(), freeze
        fault = await the_fault(live)
        assert (fault.fault, fault.rank, fault.rung) == (Fault.HANG, 1, "Respawn")
        assert "rank 1 did not leave its collective within 1.5 s and was killed" in fault.message
        assert respawns(live) == [0, 1]
        assert live.kills() == [(1, False)]


async def test_a_slow_rank_that_still_moves_is_no_hang() -> None:
    def slowly(self: FakeRank, step: bus.Step) -> None:
        self.misdeed = None
        tasks.append(asyncio.create_task(crawl(self, self.compute(step))))

    async def crawl(rank: FakeRank, answer: bus.StepDone) -> None:
        for _ in range(15):
            await asyncio.sleep(0.1)
            rank.moved_at = time.monotonic()
        rank.send(answer)

    tasks: list[asyncio.Task[None]] = []
    async with live_engine(watchdog=Watchdog(floor=0.5)) as live:
        assert await live.generate((1,), 30) == continuation((1,), 30)
        live.ranks[1].misdeed = slowly
        assert await live.generate(PROMPT, ANSWER) == continuation(PROMPT, ANSWER)
        assert len(tasks) == 1
        assert live.engine.status().faults == []


async def test_a_hang_in_steady_decode_is_noticed_at_the_learned_deadline() -> None:
    async with live_engine(watchdog=Watchdog(floor=0.5)) as live:
        assert await live.generate((1,), 30) == continuation((1,), 30)
        live.ranks[1].misdeed = silence()
        assert (await the_fault(live)).phases["detect"] < 2.0


@pytest.mark.parametrize("busy", [True, False])
async def test_a_stopped_process_is_noticed_at_once_at_work_or_at_rest(busy: bool) -> None:
    def freeze(self: FakeRank, step: bus.Step) -> None:
        self.misdeed, self.deaf = None, True
        stop(self)

    def stop(rank: FakeRank) -> None:
        live.links[1].send(bus.ProcessStopped(rank=1, pid=1001, incarnation=rank.incarnation, signal=19))

    async with live_engine() as live:
        await live.until(lambda: 1 in live.links and live.links[1].connected, "the pod is connected")
        if busy:
            live.ranks[1].misdeed = freeze
        else:
            live.ranks[1].deaf = True
            stop(live.ranks[1])
            await live.until(lambda: live.engine.status().recoveries == 1, "it is repaired")
        fault = await the_fault(live)
        assert (fault.fault, fault.rank, fault.rung) == (Fault.HANG, 1, "Respawn")
        assert "rank 1 (pid 1001) was stopped by SIGSTOP" in fault.message


async def test_a_process_that_is_stopped_before_it_has_connected_is_killed_all_the_same() -> None:
    async with live_engine() as live:
        await live.until(lambda: 1 in live.links and live.links[1].connected, "the pod is connected")
        await live.ranks[1].die()
        await live.until(lambda: live.engine.group.coordinator.is_apart, "the loss is noticed")
        live.links[1].send(bus.ProcessStopped(rank=1, pid=1002, incarnation="unheard of", signal=19))
        await live.until(lambda: live.kills() == [(1, False)], "it is to be killed")
        [kill] = [one for one in live.told if isinstance(one, bus.KillWorker)]
        assert kill.incarnation == "unheard of"
        await live.ranks[1].respawn()
        await live.ready()


async def test_a_rank_that_only_lost_its_connection_keeps_its_process() -> None:
    async with live_engine() as live:
        running = asyncio.create_task(live.generate(PROMPT, 100))
        await live.until(lambda: live.engine.stats().requests_running == 1, "it runs")
        await live.ranks[1].die()
        live.ranks[1].start()  # the same incarnation
        assert await running == continuation(PROMPT, 100)
        [fault] = live.engine.status().faults
        assert (fault.fault, fault.rank, fault.rung) == (Fault.RANK_LOST, 1, "Rebuild")
        assert respawns(live) == [0, 0]


async def test_a_shard_that_changed_is_found_before_the_group_is_used_again() -> None:
    async with live_engine() as live:
        for rank in live.ranks:
            rank.weights = 99  # on all alike: a wrong summand is in every rank's sum

        def fail(self: FakeRank, step: bus.Step) -> bus.StepFailed:
            self.misdeed = None
            return bus.StepFailed(epoch=step.epoch, step=step.step, fault=Fault.STEP_FAILED, message="by chance")

        live.ranks[1].misdeed = fail
        assert await live.generate(PROMPT, ANSWER) == continuation(PROMPT, ANSWER)
        first, second = live.engine.status().faults
        assert (first.fault, second.fault, second.rank, second.rung) == (
            Fault.STEP_FAILED, Fault.CORRUPTION, None, "Respawn",
        )  # fmt: skip
        assert "the probe's fingerprint is" in second.message
        assert respawns(live) == [1, 1]
        assert live.engine.status().state is GroupState.READY


def refuse(self: FakeRank, step: bus.Step) -> bus.StepDone | bus.StepFailed:
    if not any(13 in part.tokens for part in step.sequences if part.sequence_id):
        return self.compute(step)
    words = "no such block"
    return bus.StepFailed(epoch=step.epoch, step=step.step, fault=Fault.STEP_FAILED, message=words, untouched=True)


async def test_a_request_that_no_rank_can_begin_is_dropped_and_nothing_else_happens() -> None:
    async with live_engine() as live:
        for rank in live.ranks:
            rank.misdeed = refuse
        epoch = live.engine.status().epoch
        bad = asyncio.create_task(live.generate((1, 13), 5))
        good = [asyncio.create_task(live.generate((n,), 30)) for n in range(2, 5)]
        with pytest.raises(GenerationFailedError, match="no rank can compute this request: rank 0: no such block"):
            await bad
        assert await asyncio.gather(*good) == [continuation((n,), 30) for n in range(2, 5)]
        status = live.engine.status()
        assert (status.epoch, status.recoveries, status.state) == (epoch, 0, GroupState.READY)
        assert [(one.fault, one.rung) for one in status.faults] == [(Fault.STEP_FAILED, "Drop")]


async def test_one_rank_that_can_not_begin_is_a_fault_of_the_group() -> None:
    def fail(self: FakeRank, step: bus.Step) -> bus.StepFailed:
        self.misdeed = None
        return bus.StepFailed(
            epoch=step.epoch, step=step.step, fault=Fault.STEP_FAILED, message="by chance", untouched=True
        )

    async with live_engine() as live:
        live.ranks[1].misdeed = fail
        fault = await the_fault(live)
        assert (fault.fault, fault.rank, fault.rung) == (Fault.STEP_FAILED, 1, "Rebuild")


def always_fails(self: FakeRank, step: bus.Step) -> bus.StepFailed:
    return bus.StepFailed(epoch=step.epoch, step=step.step, fault=Fault.CONTEXT_FAULT, message="illegal address")


async def test_a_group_that_can_not_heal_itself_says_so_and_tries_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "RETRY_SECONDS", (0.0,))
    monkeypatch.setattr(timing, "POISONED_SECONDS", (0.5, 1.0))
    async with live_engine() as live:
        running = asyncio.create_task(live.generate(PROMPT, ANSWER))
        live.ranks[1].misdeed = always_fails
        await live.until(lambda: live.engine.status().state is GroupState.POISONED, "it is poisoned")
        status = live.engine.status()
        assert "10 respawns are used up" in status.message
        assert (status.faults[-1].fault, status.faults[-1].rank) == (Fault.CONTEXT_FAULT, 1)
        assert not live.engine.readiness().ready
        with pytest.raises(EngineBusyError, match="recovering, try again shortly"):
            await live.generate((1,), 1)
        live.ranks[1].misdeed = None
        assert await running == continuation(PROMPT, ANSWER)  # it only waited
        assert live.engine.status().state is GroupState.READY


async def test_a_new_pod_is_reason_enough_to_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "RETRY_SECONDS", (0.0,))
    async with live_engine() as live:
        running = asyncio.create_task(live.generate(PROMPT, ANSWER))
        live.ranks[1].misdeed = always_fails
        await live.until(lambda: live.engine.status().state is GroupState.POISONED, "it is poisoned")
        kept = live.ranks[0].incarnation
        live.ranks[1].misdeed = None
        live.engine.group.connected(_Pod(live))
        assert await running == continuation(PROMPT, ANSWER)
        assert live.ranks[0].incarnation == kept  # the others waited with their weights


class _Pod:
    """A supervisor that was not there before, in the place of pod 1's."""

    def __init__(self, live: LiveEngine) -> None:
        self._old = live.engine.group.supervisors[1]
        self.hello = bus.Hello(
            protocol=1, token="", role=bus.Role.SUPERVISOR, group=0, pod_index=1, pod="new", node="n", pid=1,
            incarnation="new",
        )  # fmt: skip

    def send(self, message: object) -> None: ...

    def send_frame(self, frame: bytes) -> None: ...

    def close(self) -> None: ...


async def test_recycle_pods_gives_up_at_once_with_one_clean_error() -> None:
    async with live_engine(recovery_strategy="RecyclePods") as live:
        live.ranks[1].misdeed = always_fails
        with pytest.raises(GenerationFailedError, match="the model is poisoned and is loaded again: ContextFault"):
            await live.generate(PROMPT, ANSWER)
        status = live.engine.status()
        assert (status.state, status.faults[-1].fault) == (GroupState.POISONED, Fault.CONTEXT_FAULT)
        assert "the group waits for new pods" in status.message
        await live.until(lambda: all(rank.aborts for rank in live.ranks), "every rank has left its collectives")
        assert respawns(live) == [0, 0]
        await live.engine.drain()  # with nothing to wait for


async def test_every_phase_is_one_line_with_the_faults_id_and_the_epoch(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with live_engine() as live:
        running = asyncio.create_task(live.generate(PROMPT, 100))
        await live.until(lambda: live.engine.stats().requests_running == 1, "it runs")
        await live.ranks[1].respawn()
        assert await running == continuation(PROMPT, 100)
    told = [(record.getMessage(), found) for record in caplog.records if (found := fields_of(record)).get("fault") == 1]
    lines = [found for _, found in told if "epoch" in found]
    assert [line["phase"] for line in lines] == ["watchdog", "abort", "respawn", "rebuild", "verify", "resumed"]
    assert [line["epoch"] for line in lines] == [1, 2, 2, 2, 2, 2]
    assert [found["rung"] for _, found in told if "rung" in found] == ["Respawn"]
    assert (lines[0]["rank"], lines[-1]["kept"]) == (1, True)
    texts = [re.match(r"(\w+): fault 1(?: epoch (\d+))?: ", text) for text, _ in told]
    assert [text and text[1] for text in texts] == [found["phase"] for _, found in told]
    requests = [
        (found["request"], record.getMessage())
        for record in caplog.records
        if "request" in (found := fields_of(record))
    ]
    [name] = {request for request, _ in requests}
    assert [text for _, text in requests] == [
        f"request {name} is queued, with {len(PROMPT)} tokens",
        f"request {name} goes on in epoch 2",
        f"request {name} is complete: length",
    ]
    assert {"detect", "abort", "respawn", "rebuild", "verify", "firstToken"} == live.engine.status().faults[
        0
    ].phases.keys()
