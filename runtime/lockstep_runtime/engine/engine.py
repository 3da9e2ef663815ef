"""The engine: requests in, tokens out, over ranks that may fail at any instant.

One task forms the group, runs step after step, and on a fault decides what to do and forms the group again; sequences
and their streams outlive all of that. Everything runs on one event loop, so nothing here needs a lock.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

from lockstep_runtime import wire
from lockstep_runtime.config import ServeConfig
from lockstep_runtime.engine.bounded import bounded
from lockstep_runtime.engine.deadline import DeadlineModel, Work, work_of
from lockstep_runtime.engine.faults import FaultBook
from lockstep_runtime.engine.forming import LOADING_SECONDS, Formed, Forming
from lockstep_runtime.engine.group import RankGroup
from lockstep_runtime.engine.inquiry import GroupFaultError, StepRefusedError
from lockstep_runtime.engine.interface import (
    EngineBusyError,
    EngineStats,
    GenerationFailedError,
    GenerationRequest,
    Readiness,
    RequestTooLongError,
    TokenEvent,
)
from lockstep_runtime.engine.latency import LatencyWindow
from lockstep_runtime.engine.probe import Memory as ProbeMemory
from lockstep_runtime.engine.probe import practice, probe
from lockstep_runtime.engine.recovery import (
    Evidence,
    Ladder,
    Recovery,
    Rung,
    points,
    spoils_caches,
    throws_doubt_on_caches,
)
from lockstep_runtime.engine.scheduler import Scheduler
from lockstep_runtime.engine.sequence import Sequence
from lockstep_runtime.engine.status import Standing, group_state, is_accepting
from lockstep_runtime.engine.stream import TokenStream
from lockstep_runtime.host.addresses import join

logger = logging.getLogger(__name__)

RETRY_SECONDS: Final = (0.0, 0.2, 0.5, 1.0, 2.0, 5.0)  # between attempts to form the group
LEAVE_SECONDS: Final = 1.0  # between a member pod's Leaving and its Release
QUIET_STATUS_SECONDS: Final = 1.0  # between reports that only bring latencies
POISONED_SECONDS: Final = (30.0, 300.0)  # before the group tries again by itself: at first, and at most
LONGEST_ABORT_SECONDS: Final = 5.0
ACCEPTING_SECONDS: Final = 120.0  # that requests are still taken while the group recovers
REFUSALS_IN_A_ROW: Final = 6  # steps that no rank could begin: then it is not the requests


class Engine:
    """Implements `EngineClient`, and listens to the bus through its `group`."""

    def __init__(self, config: ServeConfig, history: wire.GroupStatus | None = None) -> None:
        self._config = config
        self.group = RankGroup(
            config,
            first_epoch=history.epoch if history else 0,
            on_change=self._changed,
            on_break=lambda: self._wake.set(),
            on_exit=self._exited,
            on_leaving=self._leave,
            on_death=self._died_young,
            on_stuck=self._stuck,
        )
        self._inquiry = self.group.inquiry
        self._forming = Forming(self.group, config.watchdog.step_timeout, self._log_phase)
        self._deadlines = DeadlineModel(config.watchdog)
        self._ladder = Ladder(config.tensor_parallel_size, config.recovery_strategy)
        self._probe = ProbeMemory()
        self._poison = ""  # why the group can't heal itself
        self._poisonings = 0  # in a row
        self._formed_at = 0.0  # on the monotonic clock; 0 while nothing is formed, or it is broken
        self._broken_at = 0.0  # when it last was
        self._formed_steps = 0  # what `_steps` was then
        self._processes: list[str] = []  # incarnations that formed it
        self._contents: tuple[str, ...] = ()  # the caches, by rank, in which the sequences stand
        self._doubted = False  # they may hold garbage
        self._work: Work | None = None  # of the last step
        self._refusals = 0
        self._faults = FaultBook(history.faults if history else [], history.recoveries if history else 0)
        self._scheduler: Scheduler | None = None
        self._streams: dict[int, TokenStream] = {}
        self._sequences = 0
        self._steps = 0
        self._last_step_at: float | None = None
        self._latency = LatencyWindow()
        self._wake = asyncio.Event()  # there is work, or the group broke
        self._idle = asyncio.Event()
        self._idle.set()
        self._report = asyncio.Event()
        self._report_urgent = asyncio.Event()
        self._was_ready = False
        self._draining = False
        self._refusing = False
        self._state, self._since = wire.GroupState.STARTING, time.time()
        self._model_len: int | None = None
        self._model_error = ""
        self._blocker = ""  # why the api can't answer
        self._api_is_awaited = False
        self._loading = ""  # what it still reads
        self._model_known = asyncio.Event()
        self._started = time.monotonic()

    # --- EngineClient

    @property
    def max_model_len(self) -> int | None:
        """In tokens: the model's, the user's limit, or what the cache holds, whichever is least."""
        if self._scheduler is not None:
            return self._scheduler.max_model_len
        return self._length_limit()

    def readiness(self) -> Readiness:
        """Ready while the group serves or repairs itself: a short pause must not empty the Service."""
        state, reason = self._judge()
        return Readiness(self._accepts(state), reason, self._draining)

    def _accepts(self, state: wire.GroupState) -> bool:
        return is_accepting(state, time.monotonic() - self._broken_at < ACCEPTING_SECONDS)

    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            requests_running=scheduler.running if scheduler else 0,
            requests_waiting=scheduler.waiting if scheduler else 0,
            kv_blocks_used=scheduler.book.used if scheduler else 0,
            kv_blocks_total=scheduler.book.total if scheduler else 0,
            preemptions_total=scheduler.preemptions if scheduler else 0,
            steps_total=self._steps,
            recoveries_total=self._faults.recoveries,
            epoch=self._inquiry.epoch,
            last_step_at=self._last_step_at,
        )

    def generate(self, request: GenerationRequest) -> TokenStream:
        """See `EngineClient`. A refusal is raised by the first `__anext__`."""
        self._sequences += 1
        sequence_id = self._sequences
        stream = TokenStream(lambda: self._forget(sequence_id))
        try:
            self._enqueue(Sequence(sequence_id, request))
        except (RequestTooLongError, EngineBusyError) as error:
            stream.fail(error)
            return stream
        self._streams[sequence_id] = stream
        return stream

    def _enqueue(self, sequence: Sequence) -> None:
        if self._refusing:
            raise EngineBusyError("the server is shutting down", retry_after=1.0)
        scheduler = self._scheduler
        state, reason = self._judge()
        if scheduler is None or state is wire.GroupState.FAILED:
            raise EngineBusyError(f"the model is not loaded: {reason}", retry_after=5.0)
        if self._poison:
            raise EngineBusyError(f"the model is recovering, try again shortly: {self._poison}", retry_after=5.0)
        request = sequence.request
        if not request.prompt or request.max_tokens < 1:
            raise RequestTooLongError("a request needs at least one token of prompt and one of answer")
        if not scheduler.fits(sequence.most_tokens):
            raise RequestTooLongError(
                f"the prompt has {len(request.prompt)} tokens and up to {request.max_tokens} were asked for, "
                f"{sequence.most_tokens} together; at most {scheduler.max_model_len} fit"
            )
        if scheduler.waiting >= self._config.limits.max_waiting:
            raise EngineBusyError(f"{scheduler.waiting} requests are waiting already", retry_after=2.0)
        scheduler.add(sequence)
        self._idle.clear()
        self._wake.set()
        self._changed(False)

    def _forget(self, sequence_id: int) -> None:
        """Its client is gone, or it is complete."""
        self._streams.pop(sequence_id, None)
        if self._scheduler is not None:
            self._scheduler.remove(sequence_id)
        self._settle()

    def _settle(self) -> None:
        if not self._streams:
            self._idle.set()
        self._changed(False)

    def _fail(self, sequence_id: int, message: str) -> None:
        stream = self._streams.pop(sequence_id, None)
        if stream is not None:
            stream.fail(GenerationFailedError(message))
        self._settle()

    # --- the model's configuration

    def set_model(self, max_position_embeddings: int | None) -> None:
        """The model's configuration has been read."""
        self._model_len, self._model_error = max_position_embeddings, ""
        self._model_known.set()
        self._changed(True)

    def set_model_error(self, message: str) -> None:
        """It could not be read; the sentence says why."""
        self._model_error = bounded(message)
        self._changed(True)

    def set_serving_blocker(self, reason: str, *, loading: bool = False) -> None:
        """The api can't answer, whatever the ranks can: the sentence says why, until an empty one takes it back."""
        self._blocker, self._loading = ("", bounded(reason)) if loading else (bounded(reason), "")
        self._api_is_awaited = False
        self._changed(True)

    def await_api(self) -> None:
        """Until the api's first word no request is accepted: it is being imported, or loads its tokenizer."""
        self._api_is_awaited = True

    def _length_limit(self) -> int | None:
        limits = [limit for limit in (self._model_len, self._config.limits.max_model_len) if limit]
        return min(limits) if limits else None

    # --- life

    async def run(self) -> None:
        """Serve until cancelled."""
        failures = 0
        while True:
            await asyncio.sleep(RETRY_SECONDS[min(failures, len(RETRY_SECONDS) - 1)])
            steps = self._steps
            try:
                await self._form()
                await self._serve()
            except GroupFaultError as fault:
                recovery = self._suffer(fault)
                if recovery.rung is None:
                    await self._be_poisoned(recovery)
            failures = failures + 1 if self._steps == steps else 0

    async def drain(self) -> None:
        """Be unready at once, take new requests through the lame-duck time, and return when the running ones are done.

        What is not done when the grace is over is failed.
        """
        self._draining = True
        self._changed(True)
        if self._poison:
            self._fail_all(f"the server is shutting down and can't finish the request: {self._poison}")
        await asyncio.sleep(self._config.lame_duck_seconds)
        self._refusing = True
        try:
            async with asyncio.timeout(self._config.grace_seconds):
                await self._idle.wait()
        except TimeoutError:
            self._fail_all("the server is shutting down and the request was not done within the grace")

    def _fail_all(self, message: str) -> None:
        for sequence_id in list(self._streams):
            self._fail(sequence_id, message)
            self._forget(sequence_id)

    def release(self) -> None:
        """Tell every pod that it is no longer needed."""
        for supervisor in self.group.supervisors.values():
            supervisor.send(wire.Release())

    async def _form(self) -> None:
        under_way = self._deadlines.expected(self._work) if self._work else None
        doubted = self._scheduler.held() if self._scheduler and self._doubted else []
        formed = await self._forming.form(min(LONGEST_ABORT_SECONDS, under_way or 0.0), doubted)
        self._doubted = False
        if len(formed.spoiled) == 1:  # all had the same to compute it from
            [rank] = formed.spoiled
            self._faults.accuse(wire.Fault.NON_FINITE, rank, f"it stood in the KV cache of rank {rank}")
        processes = [member.last_incarnation for member in self.group.members]
        respawned = processes != self._processes
        if respawned:
            self._deadlines.processes_changed()
        verified = await self._verify(formed)
        await self._model_known.wait()
        kept = self._place(formed)
        self._processes, self._formed_at, self._formed_steps = processes, time.monotonic(), self._steps
        self._forming.in_use()
        self._tell_formed(formed, {**formed.phases, "verify": round(verified, 4)}, respawned=respawned, kept=kept)

    async def _verify(self, formed: Formed) -> float:
        """Run the probe; returns the seconds it took.

        Raises:
            GroupFaultError: it failed, or its fingerprint is not that of the first time.
        """
        begun = time.monotonic()
        incarnations = [member.last_incarnation for member in self.group.members]
        if wrong := self._probe.judge(await self._prove(probe(formed.blocks)), incarnations):
            evidence = Evidence(wire.Fault.CORRUPTION, None, wrong)
            raise GroupFaultError(evidence, [evidence])
        if not self._was_ready:
            await self._prove(practice(formed.blocks))
        seconds = time.monotonic() - begun
        self._log_phase("verify", seconds, "an all-reduce of ones and the probe gave what they must")
        return seconds

    async def _prove(self, slices: list[wire.SequenceSlice]) -> int:
        """The fingerprint of a step that nobody asked for."""
        try:
            return (await self._run_step(slices))[0].fingerprint
        except StepRefusedError as refusal:
            raise GroupFaultError(refusal.evidence[0], refusal.evidence) from refusal

    def _tell_formed(self, formed: Formed, phases: dict[str, float], *, respawned: bool, kept: bool) -> None:
        resumed = len(self._streams)
        if self._was_ready:
            words = f"{resumed} {'request goes' if resumed == 1 else 'requests go'} on in epoch {formed.epoch}"
            words += ", with the KV caches as they were" if kept else ", computed again from the tokens"
            self._log_phase("resumed", sum(phases.values()), words)
        else:
            url = f"http://{join(self._config.host, self._config.api_port)}"
            times = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in phases.items())
            logger.info("ready: %s after %.1f s (%s)", url, time.monotonic() - self._started, times)
        self._faults.repaired(phases, at=time.time(), resumed=resumed, respawned=respawned)
        self._was_ready = True
        self._changed(True)

    def _log_phase(self, phase: str, seconds: float, words: str) -> None:
        """One line a phase: `rebuild: fault 3 epoch 8: … (0.021 s)`; none while the group is first started."""
        if fault := self._faults.open_id:
            logger.info("%s: fault %d epoch %d: %s (%.3f s)", phase, fault, self._inquiry.epoch, words, seconds)

    def _place(self, formed: Formed) -> bool:
        """Whether the caches still hold what the sequences have computed.

        Else the block book is laid over the new ones, and every sequence starts over from its token ids.
        """
        if self._contents == formed.contents:
            return True
        self._contents = formed.contents
        length = self._length_limit() or formed.blocks * formed.block_size
        if self._scheduler is None:
            self._scheduler = Scheduler(
                max_sequences=self._config.limits.max_sequences,
                max_batch_tokens=self._config.limits.max_batch_tokens,
                max_model_len=length,
                blocks=formed.blocks,
                block_size=formed.block_size,
            )
            return False
        for sequence in self._scheduler.start_over(
            max_model_len=length, blocks=formed.blocks, block_size=formed.block_size
        ):
            self._fail(sequence.id, "the group came back with a smaller cache, and the request no longer fits")
        return False

    async def _serve(self) -> None:
        scheduler = self._scheduler
        if scheduler is None:
            raise RuntimeError("serving before the group was formed")
        while True:
            self._inquiry.check()
            slices = scheduler.plan()
            if not slices:
                self._wake.clear()
                self._inquiry.check()
                await self._wake.wait()
                continue
            await self._step(scheduler, slices)

    async def _step(self, scheduler: Scheduler, slices: list[wire.SequenceSlice]) -> None:
        try:
            done, seconds = await self._run_step(slices)
        except StepRefusedError as refusal:
            self._refused(scheduler, slices, refusal)
            return
        except GroupFaultError as fault:
            guilty = scheduler.blame(slices, points(fault.cause))
            for sequence in guilty:
                self._fail(sequence.id, f"the step of this request fails again and again: {fault}")
            fault.by_request = bool(guilty)
            raise
        self._refusals = 0
        self._latency.add(seconds)
        self._steps += 1
        self._poisonings = 0
        self._last_step_at = time.time()
        for drawn in scheduler.apply(slices, done.sampled, done.scored):
            stream = self._streams.get(drawn.sequence_id)
            if stream is not None:
                stream.push(TokenEvent(drawn.token, drawn.finish, drawn.prompt))
            if drawn.finish is not None:
                self._streams.pop(drawn.sequence_id, None)
                self._settle()
        self._changed(bool(done.sampled) and self._faults.token(self._last_step_at))

    async def _run_step(self, slices: list[wire.SequenceSlice]) -> tuple[wire.StepDone, float]:
        """One step under its own deadline, and the seconds it took, from which the next ones are learned."""
        self._work = work = work_of(slices)
        begun = time.monotonic()
        done = await self._inquiry.step(slices, lambda: self._deadlines.deadline(work))
        seconds = time.monotonic() - begun
        self._deadlines.learn(work, seconds)
        return done, seconds

    def _refused(self, scheduler: Scheduler, slices: list[wire.SequenceSlice], refusal: StepRefusedError) -> None:
        """No rank could begin the step, none was harmed: rung 0, once the request is known that is the cause."""
        self._refusals += 1
        cause = refusal.evidence[0]
        if self._refusals > REFUSALS_IN_A_ROW:
            raise GroupFaultError(cause, refusal.evidence)
        for sequence in scheduler.blame(slices, points(cause)):
            record = self._faults.drop(cause, at=time.time(), epoch=self._inquiry.epoch)
            logger.warning("drop: fault %d epoch %d: %s", record.id, record.epoch, cause.message)
            self._fail(sequence.id, f"no rank can compute this request: {refusal}")

    def _suffer(self, fault: GroupFaultError) -> Recovery:
        """Record the fault and start the repair; `run` forms the group again."""
        cause = fault.cause
        reload = cause.fault is not wire.Fault.HANG or not self._formed_at  # or it hung again, before the proof
        if self._formed_at:
            healthy = time.monotonic() - self._formed_at - cause.waited
            self._ladder.rest(healthy, steps=self._steps > self._formed_steps)
            self._formed_at, self._broken_at = 0.0, time.monotonic()
            asyncio.get_running_loop().call_later(ACCEPTING_SECONDS + 0.1, self._changed, True)
        if spoils_caches(fault.evidence):
            self._contents = ()
        self._doubted |= throws_doubt_on_caches(fault.evidence)
        recovery = self._ladder.decide(cause, fault.evidence, by_request=fault.by_request)
        rung = recovery.rung or ""
        if self._was_ready or not rung:
            self._faults.begin(cause, rung, at=time.time(), epoch=self._inquiry.epoch, detect=cause.waited)
        logger.warning(
            "watchdog: fault %d epoch %d: %s: %s", self._faults.open_id, self._inquiry.epoch, cause.fault, cause.message
        )
        logger.warning("%s: fault %d: %s", rung.lower() or "poisoned", self._faults.open_id, recovery.reason)
        for rank in recovery.kill:
            self.group.kill(rank, recovery.reason, reload=reload)
        self._changed(True)
        return recovery

    async def _be_poisoned(self, recovery: Recovery) -> None:
        """Leave every collective, say so, and wait for a new pod or, by the ladder, for another try with new ranks."""
        self._poison = bounded(recovery.reason)
        self._poisonings += 1
        if self._config.recovery_strategy == "RecyclePods":
            self._fail_all(f"the model is poisoned and is loaded again: {recovery.reason}")
        self._forming.give_up()
        self._changed(True)
        first, most = POISONED_SECONDS
        patience = min(most, first * 2 ** min(self._poisonings - 1, 16))
        by_itself = self._config.recovery_strategy == "Ladder"
        if not await self.group.new_pod(patience if by_itself else None):
            for member in self.group.members:
                if self._was_ready or member.stuck_for(time.monotonic()) > LOADING_SECONDS:  # a download goes on
                    self.group.kill(member.rank, f"the group was poisoned for {patience:g} s and tries again")
        for member in self.group.members:
            member.load_failure = None
        self._poison = ""
        self._changed(True)

    # --- what the group tells

    def _exited(self, rank: int, message: str) -> None:
        self._faults.explain(rank, message)
        self._changed(True)

    def _stuck(self, rank: int, how: str) -> None:
        """While the group is formed again, a rank had to be killed."""
        self._faults.name(rank, f"{how} and was killed", Rung.RESPAWN)
        self._charge(rank, how)
        self._changed(True)

    def _charge(self, rank: int, how: str) -> None:
        """A process was lost, or had to be killed, on the way: when that was once too often, the group gives up."""
        if not self._ladder.another_death():
            evidence = Evidence(wire.Fault.RANK_LOST, rank, f"{how}, again and again", final=True)
            self._inquiry.add(evidence)

    def _died_young(self, rank: int, words: str) -> None:
        """A process ended before it was loaded. A first load that fails with words may do so any number of times."""
        if not self._was_ready and self.group.members[rank].state is wire.RankState.FAILED:
            return
        words = f"{words} before it was loaded"
        logger.warning("respawn: fault %d epoch %d: %s", self._faults.open_id, self._inquiry.epoch, words)
        self._charge(rank, words)

    def _leave(self, pod_index: int) -> None:
        """A member pod was asked to end: it may soon. When all pods are, our own drain begins within that second."""
        asyncio.get_running_loop().call_later(LEAVE_SECONDS, self._let_go, pod_index)

    def _let_go(self, pod_index: int) -> None:
        if self._draining:
            return  # its rank is needed until the running requests are done; `release` follows
        logger.info("pod %d was asked to end and is released", pod_index)
        if supervisor := self.group.supervisors.get(pod_index):
            supervisor.send(wire.Release())

    # --- status

    def _judge(self) -> tuple[wire.GroupState, str]:
        standing = Standing(
            formed=self._formed_at > 0,
            was_ready=self._was_ready,
            draining=self._draining,
            model_error=self._model_error or self._blocker,
            loading=self._loading or ("the api is being started" if self._api_is_awaited else ""),
            poison=self._poison,
            problem=max(self.group.pod_problems, key=lambda one: one.at).message if self.group.pod_problems else "",
        )
        return group_state(standing, self.group.members)

    def _changed(self, urgent: bool) -> None:
        self._report.set()
        if urgent:
            self._report_urgent.set()

    def status(self) -> wire.GroupStatus:
        """As of now; the supervisor that serves it adds its incarnation and the revision."""
        state, message = self._judge()
        if state is not self._state:
            self._state, self._since = state, time.time()
        scheduler = self._scheduler
        return wire.GroupStatus(
            model=self._config.model_name,
            group=self._config.group,
            incarnation="",
            spec_revision=self._config.spec_revision,
            epoch=self._inquiry.epoch,
            state=state,
            message=message,
            since=self._since,
            accepting=self._accepts(state) and not self._api_is_awaited,
            ranks=[member.status() for member in self.group.members],
            step_latency=self._latency.latency(),
            last_step_at=self._last_step_at,
            requests_running=scheduler.running if scheduler else 0,
            requests_waiting=scheduler.waiting if scheduler else 0,
            recoveries=self._faults.recoveries,
            faults=self._faults.records,
            pod_problems=self.group.pod_problems,
        )

    async def report(self) -> None:
        """Send the status to the leader's supervisor whenever it changed, until cancelled."""
        while True:
            await self._report.wait()
            self._report.clear()
            self._report_urgent.clear()
            if supervisor := self.group.supervisors.get(0):
                supervisor.send(wire.StatusReport(status=self.status()))
            try:
                async with asyncio.timeout(QUIET_STATUS_SECONDS):
                    await self._report_urgent.wait()
            except TimeoutError:
                pass
