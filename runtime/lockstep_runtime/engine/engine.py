"""The engine: requests in, tokens out, over a group of ranks that may fail at any instant.

Its sequences and their streams outlive whatever becomes of the group; `recovery` sees to that. Everything runs on one
event loop, so nothing here needs a lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Final
from weakref import WeakValueDictionary

from lockstep_runtime import log
from lockstep_runtime.config import ServeConfig
from lockstep_runtime.engine.client import (
    EngineBusyError,
    EngineStats,
    GenerationFailedError,
    GenerationRequest,
    Readiness,
    RequestTooLongError,
    TokenEvent,
)
from lockstep_runtime.engine.pacing import Pace
from lockstep_runtime.engine.scheduler import Scheduler
from lockstep_runtime.engine.sequence import Sequence
from lockstep_runtime.engine.status_reporter import Blocker, StatusReporter
from lockstep_runtime.engine.stream import TokenStream
from lockstep_runtime.protocol.status import GroupState, GroupStatus
from lockstep_runtime.protocol.step import SequenceSlice
from lockstep_runtime.recovery.actions import Resume
from lockstep_runtime.recovery.bounded import bounded
from lockstep_runtime.recovery.changes import Changes
from lockstep_runtime.recovery.driver import GroupDriver
from lockstep_runtime.recovery.policy import blame_points
from lockstep_runtime.recovery.rank_rpc import GroupFaultError, StepRefusedError

logger = logging.getLogger(__name__)

MOST_IMAGE_BYTES: Final = 512 * 1024 * 1024  # of pixels; then requests with images are turned away
LAST_REQUEST_SECONDS: Final = 1.0  # of a drain, without a request
REFUSALS_IN_A_ROW: Final = 6  # steps that no rank could begin: then it is not the requests


class Engine:
    """Implements `EngineClient`; its `group` listens to the bus."""

    def __init__(self, config: ServeConfig, history: GroupStatus | None = None) -> None:
        self._config = config
        self._wake = asyncio.Event()  # there is work, or the group broke
        self._changes = Changes()
        self.group = GroupDriver(config, self, self._wake, self._changes, history)
        self._reporter = StatusReporter(config, self.group, self._changes)
        self._refusals = 0
        self._pace = Pace()
        self._scheduler: Scheduler | None = None
        # Its reader alone keeps a stream alive: one that nobody reads any longer is cancelled.
        self._streams: WeakValueDictionary[int, TokenStream] = WeakValueDictionary()
        self._sequences = 0
        self._steps = 0
        self._resumed_steps = 0  # what `_steps` was when the group last resumed
        self._idle = asyncio.Event()
        self._idle.set()
        self._refusing = False
        self._model_len: int | None = None

    # --- EngineClient

    @property
    def max_model_len(self) -> int | None:
        """In tokens: the model's, the user's limit, or what the cache holds, whichever is least."""
        if self._scheduler is not None:
            return self._scheduler.max_model_len
        return self._length_limit()

    def readiness(self) -> Readiness:
        """Whether the group serves, or has only just stopped: a short pause must not empty the Service."""
        return self._reporter.readiness()

    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            requests_running=scheduler.running if scheduler else 0,
            requests_waiting=scheduler.waiting if scheduler else 0,
            kv_blocks_used=scheduler.book.used if scheduler else 0,
            kv_blocks_total=scheduler.book.total if scheduler else 0,
            preemptions_total=scheduler.preemptions if scheduler else 0,
            prefix_cache_queries_total=scheduler.looked_up_tokens if scheduler else 0,
            prefix_cache_hits_total=scheduler.cached_tokens if scheduler else 0,
            steps_total=self._steps,
            recoveries_total=self.group.faults.recoveries,
            epoch=self.group.coordinator.epoch,
            last_step_at=self._reporter.last_step_at,
        )

    def generate(self, request: GenerationRequest) -> TokenStream:
        """See `EngineClient`. A refusal is raised by the first `__anext__`."""
        self._sequences += 1
        sequence_id = self._sequences
        stream = TokenStream(request.request_id, lambda: self._cancel(sequence_id, request.request_id))
        try:
            self._enqueue(Sequence(sequence_id, request))
        except (RequestTooLongError, EngineBusyError) as error:
            stream.fail(error)
            return stream
        self._streams[sequence_id] = stream
        self._log_request(logging.DEBUG, request.request_id, f"is queued, with {len(request.prompt)} tokens")
        return stream

    def _log_request(self, level: int, request_id: str, what: str) -> None:
        if logger.isEnabledFor(level):
            about = log.fields(request=request_id, epoch=self.group.coordinator.epoch)
            logger.log(level, "request %s %s", request_id, what, extra=about)

    def _enqueue(self, sequence: Sequence) -> None:
        if self._refusing:
            raise EngineBusyError("the server is shutting down", retry_after=1.0)
        scheduler = self._scheduler
        state, reason = self._reporter.state()
        if scheduler is None or state is GroupState.FAILED:
            raise EngineBusyError(f"the model is not loaded: {reason}", retry_after=5.0)
        if poison := self.group.coordinator.poison:
            raise EngineBusyError(f"the model is recovering, try again shortly: {poison}", retry_after=5.0)
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
        if request.images and scheduler.image_bytes > MOST_IMAGE_BYTES:
            raise EngineBusyError("too many images are waiting already", retry_after=2.0)
        scheduler.add(sequence)
        self._idle.clear()
        self._wake.set()
        self._changes.tell(urgent=False)

    def _cancel(self, sequence_id: int, request_id: str) -> None:
        """Its client is gone."""
        self._log_request(logging.DEBUG, request_id, "is cancelled")
        self._forget(sequence_id)

    def _forget(self, sequence_id: int) -> None:
        self._streams.pop(sequence_id, None)
        if self._scheduler is not None:
            self._scheduler.remove(sequence_id)
        self._settle()

    def _settle(self) -> None:
        if not self._streams:
            self._idle.set()
        self._changes.tell(urgent=False)

    def _fail(self, sequence_id: int, message: str) -> None:
        stream = self._streams.pop(sequence_id, None)
        if stream is not None:
            self._log_request(logging.WARNING, stream.request_id, f"fails: {message}")
            stream.fail(GenerationFailedError(message))
        self._settle()

    # --- the model's configuration

    def set_model(self, max_position_embeddings: int | None) -> None:
        """The model's configuration has been read."""
        self._model_len = max_position_embeddings
        self._reporter.model_error = Blocker()
        self.group.model_read()

    def set_commit(self, commit: str) -> None:
        """Of the hub's model, that every pod is to load; empty: not known yet."""
        if commit and commit != self._reporter.commit:
            self._reporter.commit = commit
            self.group.set_commit(commit)
            self._changes.tell()

    def set_model_error(self, message: str, *, may_pass: bool = False) -> None:
        """Set why the model's configuration can't be read. `may_pass`: whether that may resolve by itself."""
        self._reporter.model_error = Blocker(bounded(message), may_pass)
        self._changes.tell()

    def set_serving_blocker(self, reason: str, *, loading: bool = False, may_pass: bool = False) -> None:
        """See `EngineClient`."""
        self._reporter.set_api(Blocker(bounded(reason), may_pass), loading=loading)

    def await_api(self) -> None:
        """Accept no request before the api's first report: it is being imported, or loads its tokenizer."""
        self._reporter.api_is_awaited = True

    def _length_limit(self) -> int | None:
        limits = [limit for limit in (self._model_len, self._config.limits.max_model_len) if limit]
        return min(limits) if limits else None

    # --- life

    async def run(self) -> None:
        """Serve until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.group.run())
            tasks.create_task(self._serve_on())

    async def drain(self) -> None:
        """Be unready at once, take new requests through the lame-duck time and the last ones of open connections, and
        return when the running ones are done.

        What is not done when the grace is over is failed.
        """
        self.group.draining = True
        self._changes.tell()
        if poison := self.group.coordinator.poison:
            self._fail_all(f"the server is shutting down and can't finish the request: {poison}")
        await asyncio.sleep(self._config.lame_duck_seconds)
        try:
            async with asyncio.timeout(self._config.grace_seconds):
                await self._last_requests()
                self._refusing = True
                await self._idle.wait()
        except TimeoutError:
            self._fail_all("the server is shutting down and the request was not done within the grace")

    async def _last_requests(self) -> None:
        """Until none has come for a second, or half of the grace is over. A client whose stream began before keeps its
        connection and asks once more by it; that answer says that the connection closes."""
        if not self._config.lame_duck_seconds:  # there is nobody else to ask
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.grace_seconds / 2):
                asked = -1
                while asked != self._sequences:
                    await self._idle.wait()
                    asked = self._sequences
                    await asyncio.sleep(LAST_REQUEST_SECONDS)

    def _fail_all(self, message: str) -> None:
        for sequence_id in list(self._streams):
            self._fail(sequence_id, message)
            self._forget(sequence_id)

    def release(self) -> None:
        """Release every pod."""
        self.group.release()

    def status(self) -> GroupStatus:
        """As of now; the supervisor that serves it adds its incarnation and the revision."""
        return self._reporter.status(self._scheduler)

    async def report(self) -> None:
        """Send the status to the leader's supervisor whenever it changed, until cancelled."""
        await self._reporter.run(self.status)

    # --- what the group asks and tells

    def in_caches(self) -> list[SequenceSlice]:
        """What the caches hold: of each sequence its last computed token. What no sequence holds is forgotten: nobody
        looks at it, and there may be garbage in it."""
        if self._scheduler is None:
            return []
        self._scheduler.forget_cached()
        return self._scheduler.held()

    def poisoned(self, reason: str) -> None:
        """Requests wait for the next try, unless the pods are to be replaced, the leader's among them."""
        if self._config.recovery_strategy == "RecyclePods":
            self._fail_all(f"the model is poisoned and is loaded again: {reason}")

    async def finished(self) -> None:
        """Wait until no request runs."""
        await self._idle.wait()

    def resume(self, resumed: Resume) -> int:
        """Go on where the sequences stood, or from their token ids if the caches are others."""
        self._resumed_steps = self._steps
        for stream in self._streams.values():
            self._log_request(logging.DEBUG, stream.request_id, f"goes on in epoch {resumed.epoch}")
        length = self._length_limit() or resumed.blocks * resumed.block_size
        if self._scheduler is None:
            self._scheduler = Scheduler(
                max_sequences=self._config.limits.max_sequences,
                max_batch_tokens=self._config.limits.max_batch_tokens,
                max_model_len=length,
                blocks=resumed.blocks,
                block_size=resumed.block_size,
                state_slots=resumed.state_slots,
                prefix_caching=self._config.limits.prefix_caching,
            )
        elif not resumed.kept:
            for sequence in self._scheduler.start_over(
                max_model_len=length,
                blocks=resumed.blocks,
                block_size=resumed.block_size,
                state_slots=resumed.state_slots,
            ):
                self._fail(sequence.id, "the group came back with a smaller cache, and the request no longer fits")
        self._scheduler.forget_images()
        return len(self._streams)

    # --- steps

    async def _serve_on(self) -> None:
        while True:
            await self.group.serving.wait()
            try:
                await self._serve()
            except GroupFaultError as fault:
                self._break(fault, by_request=False)

    def _break(self, fault: GroupFaultError, *, by_request: bool) -> None:
        self.group.broken(fault, by_request=by_request, steps=self._steps - self._resumed_steps)

    async def _serve(self) -> None:
        """Step after step, until one fails.

        Raises:
            GroupFaultError: the group broke between two steps.
        """
        scheduler = self._scheduler
        if scheduler is None:
            raise RuntimeError("serving before the group was formed")
        while self.group.serving.is_set():
            self.group.check()
            slices = scheduler.plan(self._pace.prefill_tokens())
            if admitted := scheduler.take_admitted():
                self._begin(admitted)
            if not slices:
                self._wake.clear()
                self.group.check()
                await self._wake.wait()
                continue
            await self._step(scheduler, slices)

    def _begin(self, admitted: list[int]) -> None:
        now = time.monotonic()
        for sequence_id in admitted:
            stream = self._streams.get(sequence_id)
            if stream is not None and stream.begun is None:
                stream.begun = now

    async def _step(self, scheduler: Scheduler, slices: list[SequenceSlice]) -> None:
        images, pixels = scheduler.images.work()
        try:
            done, seconds = await self.group.step(slices, images, pixels)
        except StepRefusedError as refusal:
            self._refused(scheduler, slices, refusal)
            return
        except GroupFaultError as fault:
            rejected = scheduler.fault_points(slices, blame_points(fault.cause))
            for sequence in rejected:
                self._fail(sequence.id, f"the step of this request fails again and again: {fault}")
            self._break(fault, by_request=bool(rejected))
            return
        self._refusals = 0
        self._steps += 1
        self._reporter.stepped(seconds)
        if not images.encode:  # which takes longer than the tokens alone
            self._pace.learn(slices, seconds)
        for sequence_id, why in done.failures.items():
            self._fail(sequence_id, f"the answer can't be constrained: {why}")
            scheduler.remove(sequence_id)
        for drawn in scheduler.apply(slices, done.sampled, done.scored, done.put_off):
            stream = self._streams.get(drawn.sequence_id)
            if stream is not None:
                stream.push(TokenEvent(drawn.token, drawn.finish, drawn.prompt, drawn.cached, stream.begun))
                if drawn.finish is not None:
                    self._log_request(logging.DEBUG, stream.request_id, f"is complete: {drawn.finish}")
            if drawn.finish is not None:
                self._streams.pop(drawn.sequence_id, None)
                self._settle()
        self._changes.tell(urgent=bool(done.sampled) and self.group.faults.token(time.time()))

    def _refused(self, scheduler: Scheduler, slices: list[SequenceSlice], refusal: StepRefusedError) -> None:
        """No rank could begin the step, none was harmed: rung 0, once the request is known that is the cause."""
        self._refusals += 1
        cause = refusal.evidence[0]
        if self._refusals > REFUSALS_IN_A_ROW:
            raise GroupFaultError(cause, refusal.evidence)
        for sequence in scheduler.fault_points(slices, blame_points(cause)):
            self.group.drop(cause)
            self._fail(sequence.id, f"no rank can compute this request: {refusal}")
