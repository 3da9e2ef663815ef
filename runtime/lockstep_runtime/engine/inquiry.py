"""Asks the ranks one question under a deadline, and judges what they answer, fail in, or leave unsaid.

What speaks against the epoch is evidence, whoever brings it. It settles the question under way, and whoever waits for
the answers gets it as a `GroupFaultError`; from then on nothing is asked until a new epoch begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NoReturn, TypeVar, cast

import msgspec

from lockstep_runtime import wire
from lockstep_runtime.engine.deadline import Deadline, Patience, extension
from lockstep_runtime.engine.look import Look
from lockstep_runtime.engine.members import Member
from lockstep_runtime.engine.recovery import Evidence, compare, diagnose, silent
from lockstep_runtime.engine.suspect import Suspicion, suspect
from lockstep_runtime.transport import encode
from lockstep_runtime.wire import Fault

_A = TypeVar("_A", wire.RendezvousOpened, wire.Joined, wire.CacheAllocated, wire.StepDone)
Answer = wire.RendezvousOpened | wire.Joined | wire.CacheAllocated | wire.StepDone

HEARSAY_SECONDS: Final = 0.5  # how long to wait for the cause when ranks only report its effect
UNTOUCHED_SECONDS: Final = 0.1  # and for the other ranks to say that they could not begin the step either
UNTOUCHED_LOOK_SECONDS: Final = 0.005  # between two looks at whether one of them has begun it


class GroupFaultError(RuntimeError):
    """The group can't go on in this epoch; `evidence` says what is known, the cause first."""

    def __init__(self, cause: Evidence, evidence: Sequence[Evidence]) -> None:
        super().__init__(cause.message)
        self.cause = cause
        self.evidence = tuple(evidence)
        self.by_request = False  # a request of the step was found guilty


class StepRefusedError(RuntimeError):
    """No rank could begin the step, and none was harmed: something is wrong with what was asked for."""

    def __init__(self, evidence: Sequence[Evidence]) -> None:
        super().__init__(evidence[0].message)
        self.evidence = tuple(evidence)


@dataclass(slots=True)
class _Question:
    """Answers of one kind that are awaited from some ranks."""

    kind: type[Answer]
    step: int
    ranks: frozenset[int]
    done: asyncio.Future[None]
    answers: dict[int, Answer] = field(default_factory=dict)
    refused: dict[int, Evidence] = field(default_factory=dict)  # by ranks that could not begin

    @property
    def silent(self) -> list[int]:
        return sorted(self.ranks - self.answers.keys())

    def settle(self) -> None:
        if not self.done.done():
            self.done.set_result(None)


class Inquiry:
    """Of all `members`, in one epoch at a time. `on_break` is called when evidence came in."""

    def __init__(self, members: Sequence[Member], look: Look, epoch: int, on_break: Callable[[], None]) -> None:
        self.epoch = epoch
        self._members = members
        self._look = look
        self._on_break = on_break
        self._evidence: list[Evidence] = []
        self._question: _Question | None = None
        self._step = 0

    def begin_epoch(self) -> None:
        """What was known of the last one is forgotten."""
        self._evidence.clear()
        self.epoch += 1

    def check(self) -> None:
        """Raise what has come in since the epoch began.

        Raises:
            GroupFaultError: this epoch is over.
        """
        if any(not one.hearsay for one in self._evidence):
            self._raise()

    def _raise(self) -> NoReturn:
        raise GroupFaultError(diagnose(self._evidence), self._evidence)

    # --- what comes in

    def add(self, evidence: Evidence) -> None:
        """End what is under way, forming included, with this evidence."""
        self._evidence.append(evidence)
        if evidence.hearsay:
            asyncio.get_running_loop().call_later(HEARSAY_SECONDS, self._break, self.epoch)
        else:
            self._break(self.epoch)

    def _break(self, epoch: int) -> None:
        if epoch != self.epoch or not self._evidence:
            return
        if self._question is not None:
            self._question.settle()
        self._on_break()

    def explain(self, rank: int, words: str) -> None:
        """Better words for a loss that has not been raised yet."""
        for index, one in enumerate(self._evidence):
            if one.rank == rank and one.fault is Fault.RANK_LOST and not one.hearsay:
                self._evidence[index] = replace(one, message=words)

    def answered(self, member: Member, answer: Answer) -> None:
        """A rank answers; what is not for the question under way is dropped."""
        question = self._question
        if question is None or type(answer) is not question.kind or answer.epoch != self.epoch:
            return
        if isinstance(answer, wire.StepDone):
            if answer.step != question.step:
                return
            member.stepped(answer, time.time())
        if member.rank in question.ranks:
            question.answers[member.rank] = answer
            if len(question.answers) == len(question.ranks):
                question.settle()

    def failed(self, member: Member, message: wire.StepFailed) -> None:
        """A rank says that it failed, or that another one did."""
        if message.epoch != self.epoch:
            return
        hearsay = message.fault is Fault.RANK_LOST  # of itself, a rank that speaks can't say so
        # NaN in one rank's part is NaN in the sum of all: whoever finds it need not be its source.
        culprit = None if message.fault is Fault.NON_FINITE and len(self._members) > 1 else member.rank
        evidence = Evidence(message.fault, culprit, f"rank {member.rank}: {message.message}", hearsay)
        question = self._question
        if message.untouched and message.fault is Fault.STEP_FAILED and question and message.step == question.step:
            self._refuse(question, member.rank, evidence)
        else:
            self.add(evidence)

    def _refuse(self, question: _Question, rank: int, evidence: Evidence) -> None:
        """A rank could not begin the step. When all say so, the step is at fault and the group as good as before."""
        question.refused[rank] = evidence
        question.settle()

    # --- what is asked

    async def step(self, sequences: list[wire.SequenceSlice], deadline: Callable[[], Deadline]) -> wire.StepDone:
        """Run one step on every rank and return what rank 0 says of it, once all ranks agree. What its deadline is, is
        asked when the ranks are at work: they wait for nothing that isn't needed to begin.

        Raises:
            GroupFaultError: a rank failed, was lost, differs from the others, or hangs.
            StepRefusedError: no rank could begin it; the group is as good as before.
        """
        self._step += 1
        step = wire.Step(epoch=self.epoch, step=self._step, sequences=sequences)
        question = self._put(self._members, step, wire.StepDone)
        answers: dict[int, wire.StepDone] = await self._answers(question, deadline())
        if odd := compare(answers):
            self._evidence.append(odd)
            self._raise()
        return answers[0]

    async def ask(
        self, members: Sequence[Member], message: msgspec.Struct, kind: type[_A], deadline: Deadline
    ) -> dict[int, _A]:
        """The answers of these ranks, by rank.

        Raises:
            GroupFaultError: there is evidence against this epoch, or an answer did not come in time.
            StepRefusedError: the question is a step that none of them could begin.
        """
        return await self._answers(self._put(members, message, kind), deadline)

    def _put(self, members: Sequence[Member], message: msgspec.Struct, kind: type[_A]) -> _Question:
        self.check()
        done = asyncio.get_running_loop().create_future()
        step = message.step if isinstance(message, wire.Step) else -1
        self._question = question = _Question(kind, step, frozenset(member.rank for member in members), done)
        frame = encode(message)
        for member in members:
            if member.peer is not None:
                member.peer.send_frame(frame)
        return question

    async def _answers(self, question: _Question, deadline: Deadline) -> dict[int, _A]:
        try:
            await self._watch(question, deadline)
            if question.refused:
                await self._hear_others(question)
        finally:
            self._question = None
        if len(question.answers) < len(question.ranks):
            if len(question.refused) == len(question.ranks) and not self._evidence:
                raise StepRefusedError(list(question.refused.values()))
            self._evidence.extend(question.refused.values())
            self._raise()
        return cast("dict[int, _A]", question.answers)

    async def _hear_others(self, question: _Question) -> None:
        """Until every rank has refused the step, or one has begun it, or there has been time enough to refuse."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(UNTOUCHED_SECONDS):
                while not self._evidence and len(question.refused) < len(question.ranks):
                    records = await self._look.at_everyone()
                    if any(_has_begun(record, self.epoch, question.step) for record in records):
                        return
                    await asyncio.sleep(UNTOUCHED_LOOK_SECONDS)

    async def _watch(self, question: _Question, deadline: Deadline) -> None:
        """Until it is settled, or its deadline is over and nobody gets any further."""
        patience = Patience(deadline.seconds, time.monotonic())
        while not question.done.done():
            await asyncio.wait([question.done], timeout=patience.nap())
            patience.woke(time.monotonic())
            if question.done.done() or not patience.is_over:
                continue
            records = await self._look.at_everyone()
            if question.done.done():
                return
            suspicion = suspect(
                records, epoch=self.epoch, step=question.step, silent=question.silent, size=len(self._members)
            )
            if more := _grace(question, deadline, patience, suspicion):
                patience.extend(more)
                continue
            self._evidence.append(silent(question.silent, question.kind.__name__, patience.waited, suspicion))
            return


def _has_begun(record: wire.ProgressRecord, epoch: int, step: int) -> bool:
    return (record.epoch, record.step) == (epoch, step) and record.collective > 0


def _grace(question: _Question, deadline: Deadline, patience: Patience, suspicion: Suspicion) -> float:
    """Seconds more; 0: it hangs. Ranks that are all joining wait for the network, not for each other."""
    if question.kind is wire.Joined and not suspicion.laggards:
        return min(deadline.seconds, max(0.0, deadline.ceiling - patience.waited))
    return extension(deadline, patience, suspicion.moved_ago)
