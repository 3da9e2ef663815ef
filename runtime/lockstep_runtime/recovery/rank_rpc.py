"""One call to the ranks at a time, under a deadline: returns their answers or raises the evidence of a failure.

Evidence from any source settles the pending call, whose caller gets a `GroupFaultError`; no further call is made until
a new epoch begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NoReturn, cast

import msgspec

from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.framing import encode
from lockstep_runtime.protocol.status import Fault
from lockstep_runtime.protocol.step import SequenceSlice
from lockstep_runtime.recovery.bus_server import Peer
from lockstep_runtime.recovery.coordinator import Coordinator
from lockstep_runtime.recovery.diagnosis import Evidence, compare, diagnose, no_answer
from lockstep_runtime.recovery.events import Answer
from lockstep_runtime.recovery.hang_attribution import HangReport, attribute
from lockstep_runtime.recovery.progress_query import ProgressQuery
from lockstep_runtime.recovery.watchdog import Deadline, DeadlineTimer, extension

SECONDARY_SECONDS: Final = 0.5  # how long to wait for the cause when ranks only report its effect
NOT_STARTED_SECONDS: Final = 0.1  # and for the other ranks to say that they could not begin the step either
NOT_STARTED_LOOK_SECONDS: Final = 0.005  # between two looks at whether one of them has begun it


class GroupFaultError(RuntimeError):
    """The group can't continue in this epoch, by this evidence."""

    def __init__(self, cause: Evidence, evidence: Sequence[Evidence]) -> None:
        super().__init__(cause.message)
        self.cause = cause
        self.evidence = tuple(evidence)


class StepRefusedError(RuntimeError):
    """No rank could begin the step, and none was harmed: something is wrong with what was asked for."""

    def __init__(self, evidence: Sequence[Evidence]) -> None:
        super().__init__(evidence[0].message)
        self.evidence = tuple(evidence)


@dataclass(slots=True)
class _PendingCall:
    """Answers of one kind that are awaited from some ranks."""

    kind: type[Answer]
    step: int
    ranks: frozenset[int]
    done: asyncio.Future[None]
    answers: dict[int, Answer] = field(default_factory=dict)
    refused: dict[int, Evidence] = field(default_factory=dict)  # by ranks that could not begin

    @property
    def unanswered(self) -> list[int]:
        return sorted(self.ranks - self.answers.keys())

    def settle(self) -> None:
        if not self.done.done():
            self.done.set_result(None)


class RankRpc:
    """To a group's ranks, `peers` by rank, in its epoch. `wake` is set when evidence comes in."""

    def __init__(
        self, group: Coordinator, peers: Mapping[int, Peer], progress: ProgressQuery, wake: asyncio.Event
    ) -> None:
        self._group, self._handles, self._peers = group, group.handles, peers
        self._progress = progress
        self._wake = wake
        self._evidence: list[Evidence] = []
        self._call: _PendingCall | None = None
        self._step = 0

    @property
    def epoch(self) -> int:
        return self._group.epoch

    def begin_epoch(self) -> None:
        """What was known of the last one is forgotten."""
        self._evidence.clear()

    def check(self) -> None:
        """Raise what has come in since the epoch began.

        Raises:
            GroupFaultError: this epoch is over.
        """
        if any(not one.secondary for one in self._evidence):
            self._raise()

    def _raise(self) -> NoReturn:
        raise GroupFaultError(diagnose(self._evidence), self._evidence)

    # --- what comes in

    def add(self, evidence: Evidence) -> None:
        """End what is under way, forming included, with this evidence."""
        self._evidence.append(evidence)
        if evidence.secondary:
            asyncio.get_running_loop().call_later(SECONDARY_SECONDS, self._break, self.epoch)
        else:
            self._break(self.epoch)

    def _break(self, epoch: int) -> None:
        if epoch != self.epoch or not self._evidence:
            return
        if self._call is not None:
            self._call.settle()
        self._wake.set()

    def refine(self, before: str, message: str) -> None:
        """A better message for a loss that has not been raised yet."""
        for index, one in enumerate(self._evidence):
            if one.message == before:
                self._evidence[index] = replace(one, message=message)

    def answered(self, rank: int, answer: Answer) -> None:
        """A rank answers; what is not for the call under way is dropped."""
        call = self._call
        if call is None or type(answer) is not call.kind or answer.epoch != self.epoch:
            return
        if isinstance(answer, bus.StepDone):
            if answer.step != call.step:
                return
            self._handles[rank].stepped(answer, time.time())
        if rank in call.ranks:
            call.answers[rank] = answer
            if len(call.answers) == len(call.ranks):
                call.settle()

    def failed(self, rank: int, message: bus.StepFailed) -> None:
        """A rank reports its own failure, or another's."""
        if message.epoch != self.epoch:
            return
        secondary = message.fault is Fault.RANK_LOST  # of itself, a rank that speaks can't say so
        # NaN in one rank's part is NaN in the sum of all: whoever finds it need not be its source.
        culprit = None if message.fault is Fault.NON_FINITE and len(self._handles) > 1 else rank
        evidence = Evidence(message.fault, culprit, f"rank {rank}: {message.message}", secondary)
        call = self._call
        if message.untouched and message.fault is Fault.STEP_FAILED and call and message.step == call.step:
            self._refuse(call, rank, evidence)
        else:
            self.add(evidence)

    def _refuse(self, call: _PendingCall, rank: int, evidence: Evidence) -> None:
        """A rank could not begin the step. When all report so, the step is the cause and the group is unharmed."""
        call.refused[rank] = evidence
        call.settle()

    # --- what is asked

    async def step(
        self, sequences: list[SequenceSlice], deadline: Callable[[], Deadline], images: bus.ImageWork = bus.NO_IMAGES
    ) -> bus.StepDone:
        """Run one step on every rank; returns rank 0's answer once all ranks agree. `deadline` is called when the ranks
        are at work already, so that they don't wait for it.

        Raises:
            GroupFaultError: a rank failed, was lost, differs from the others, or hangs.
            StepRefusedError: no rank could begin it; the group is unharmed.
        """
        self._step += 1
        step = bus.Step(epoch=self.epoch, step=self._step, sequences=sequences, images=images)
        call = self._put(range(len(self._handles)), step, bus.StepDone)
        answers = cast("dict[int, bus.StepDone]", await self._answers(call, deadline()))
        if odd := compare(answers):
            self._evidence.append(odd)
            self._raise()
        return answers[0]

    async def call_all(
        self, ranks: Sequence[int], message: msgspec.Struct, kind: type[Answer], deadline: Deadline
    ) -> dict[int, Answer]:
        """The answers of these ranks, by rank.

        Raises:
            GroupFaultError: there is evidence against this epoch, or an answer did not come in time.
            StepRefusedError: the call is a step that none of them could begin.
        """
        return await self._answers(self._put(ranks, message, kind), deadline)

    def _put(self, ranks: Sequence[int], message: msgspec.Struct, kind: type[Answer]) -> _PendingCall:
        self.check()
        done = asyncio.get_running_loop().create_future()
        step = message.step if isinstance(message, bus.Step) else -1
        self._call = call = _PendingCall(kind, step, frozenset(ranks), done)
        frame = encode(message)
        for rank in ranks:
            if peer := self._peers.get(rank):
                peer.send_frame(frame)
        return call

    async def _answers(self, call: _PendingCall, deadline: Deadline) -> dict[int, Answer]:
        try:
            await self._watch(call, deadline)
            if call.refused:
                await self._hear_others(call)
        finally:
            self._call = None
        if len(call.answers) < len(call.ranks):
            if len(call.refused) == len(call.ranks) and not self._evidence:
                raise StepRefusedError(list(call.refused.values()))
            self._evidence.extend(call.refused.values())
            self._raise()
        return call.answers

    async def _hear_others(self, call: _PendingCall) -> None:
        """Until every rank has refused the step, or one has begun it, or there has been time enough to refuse."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(NOT_STARTED_SECONDS):
                while not self._evidence and len(call.refused) < len(call.ranks):
                    records = await self._progress.fetch()
                    if any(_has_begun(record, self.epoch, call.step) for record in records):
                        return
                    await asyncio.sleep(NOT_STARTED_LOOK_SECONDS)

    async def _watch(self, call: _PendingCall, deadline: Deadline) -> None:
        """Until it is settled, or its deadline is over and nobody gets any further."""
        timer = DeadlineTimer(deadline.seconds, time.monotonic())
        while not call.done.done():
            await asyncio.wait([call.done], timeout=timer.next_wait())
            timer.elapsed(time.monotonic())
            if call.done.done() or not timer.is_over:
                continue
            records = await self._progress.fetch()
            if call.done.done():
                return
            report = attribute(
                records, epoch=self.epoch, step=call.step, silent=call.unanswered, size=len(self._handles)
            )
            if more := _grace(call, deadline, timer, report):
                timer.extend(more)
                continue
            self._evidence.append(no_answer(call.unanswered, call.kind.__name__, timer.waited, report))
            return


def _has_begun(record: bus.ProgressRecord, epoch: int, step: int) -> bool:
    return (record.epoch, record.step) == (epoch, step) and record.collective > 0


def _grace(call: _PendingCall, deadline: Deadline, timer: DeadlineTimer, report: HangReport) -> float:
    """Seconds more; 0: it hangs. Ranks that are all joining wait for the network, not for each other."""
    if call.kind is bus.Joined and not report.stragglers:
        return min(deadline.seconds, max(0.0, deadline.ceiling - timer.waited))
    return extension(deadline, timer, report.moved_ago)
