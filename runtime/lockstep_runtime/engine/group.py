"""The ranks as one: the start dance, the step, and what breaks either. All on one event loop.

A group is formed anew under a rising epoch, at the start as after every fault: `Abort` to all, wait until each rank is
loaded and idle, `Rendezvous` at rank 0, `Join`, `AllocateCache`. Whatever happens to a rank in between raises
`GroupFaultError` in whoever waits for it; the caller decides and forms the group again.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, TypeVar, cast

import msgspec

from lockstep_runtime import wire
from lockstep_runtime.config import ServeConfig
from lockstep_runtime.engine.bus import FromPeer, Peer
from lockstep_runtime.engine.members import Member
from lockstep_runtime.engine.recovery import Evidence, compare, diagnose, silent
from lockstep_runtime.transport import encode
from lockstep_runtime.wire import Fault, RankState

logger = logging.getLogger(__name__)
_A = TypeVar("_A", wire.RendezvousOpened, wire.Joined, wire.CacheAllocated, wire.StepDone)
Answer = wire.RendezvousOpened | wire.Joined | wire.CacheAllocated | wire.StepDone

RENDEZVOUS_SECONDS: Final = 15.0
JOIN_SECONDS: Final = 60.0
ALLOCATE_SECONDS: Final = 120.0
ABORT_SECONDS: Final = 5.0  # a rank that has not left its collective by then is killed
ABORT_JOIN_SECONDS: Final = 15.0  # joining can't be interrupted; it ends by itself, sooner than this
HEARSAY_SECONDS: Final = 0.5  # how long to wait for the cause when ranks only report its effect


class GroupFaultError(RuntimeError):
    """The group can't go on in this epoch; `evidence` says what is known, the cause first."""

    def __init__(self, cause: Evidence, evidence: Sequence[Evidence]) -> None:
        super().__init__(cause.message)
        self.cause = cause
        self.evidence = tuple(evidence)


@dataclass(frozen=True, slots=True)
class Formed:
    """A group that has joined. `phases` are seconds of: abort, respawn, rebuild."""

    epoch: int
    blocks: int
    block_size: int
    phases: dict[str, float]


@dataclass(slots=True)
class _Question:
    """Answers of one kind that are awaited from some ranks."""

    kind: type[Answer]
    step: int
    ranks: frozenset[int]
    done: asyncio.Future[None]
    answers: dict[int, Answer] = field(default_factory=dict)


class RankGroup:
    """The bus's listener. `on_change(urgent)` is called when the status changed, `on_break` when evidence came in,
    `on_exit` with a rank and what became of its process, `on_leaving` with a pod that was asked to end."""

    def __init__(
        self,
        config: ServeConfig,
        *,
        first_epoch: int,
        on_change: Callable[[bool], None],
        on_break: Callable[[], None],
        on_exit: Callable[[int, str], None],
        on_leaving: Callable[[int], None],
    ) -> None:
        self._config = config
        self.members = [
            Member(rank=rank, pod_index=rank // config.ranks_per_pod) for rank in range(config.tensor_parallel_size)
        ]
        self.supervisors: dict[int, Peer] = {}
        self.epoch = first_epoch
        self.formed = False  # and nothing has broken it since
        self._joined = False  # in this epoch, whatever became of it
        self.on_stuck: Callable[[int], None] = lambda rank: None
        self._on_change, self._on_break, self._on_exit, self._on_leaving = on_change, on_break, on_exit, on_leaving
        self._evidence: list[Evidence] = []
        self._gathering = True  # while ranks come and go without being missed
        self._patience = ABORT_SECONDS
        self._moved = asyncio.Event()  # a rank's state changed
        self._question: _Question | None = None
        self._step = 0
        self._exits: dict[str, str] = {}

    # --- the bus's listener

    def admit(self, hello: wire.Hello) -> wire.Welcome | wire.Refused:
        """Whether this peer belongs here; the epoch rises above what it has seen under another engine."""
        if reason := self._why_not(hello):
            return wire.Refused(reason=reason, retry=False)
        known = hello.role is wire.Role.WORKER and self.members[hello.rank].last_incarnation == hello.incarnation
        self.epoch = max(self.epoch, hello.epoch if known else hello.epoch + 1)
        return wire.Welcome(epoch=self.epoch)

    def _why_not(self, hello: wire.Hello) -> str:
        if hello.group != self._config.group:
            return f"this is group {self._config.group}, not {hello.group}"
        if not 0 <= hello.pod_index < self._config.pods:
            return f"there is no pod {hello.pod_index} in a group of {self._config.pods}"
        if hello.role is wire.Role.SUPERVISOR:
            return ""
        if not 0 <= hello.rank < len(self.members) or self.members[hello.rank].pod_index != hello.pod_index:
            return f"rank {hello.rank} does not belong to pod {hello.pod_index}"
        if hello.incarnation in self.members[hello.rank].retired:
            return f"another process has taken the place of this rank {hello.rank}"
        return ""

    def connected(self, peer: Peer) -> None:
        hello = peer.hello
        if hello.role is wire.Role.SUPERVISOR:
            if before := self.supervisors.get(hello.pod_index):
                before.close()
            self.supervisors[hello.pod_index] = peer
            logger.info("the supervisor of pod %d (%s) has connected", hello.pod_index, hello.pod)
        else:
            member = self.members[hello.rank]
            if member.peer is not None:
                self._miss(member, "another process has taken its place")
            member.arrive(peer, self.epoch)
            logger.info("rank %d has connected (pid %d, pod %s)", hello.rank, hello.pid, hello.pod)
        self._changed()

    def received(self, peer: Peer, message: FromPeer) -> None:
        if isinstance(message, wire.ProcessExited | wire.Leaving):
            self._from_supervisor(peer, message)
            return
        member = self.members[peer.hello.rank]
        if member.peer is not peer:
            return  # what a replaced connection had still under way
        self._from_worker(member, message)

    def lost(self, peer: Peer) -> None:
        hello = peer.hello
        if hello.role is wire.Role.SUPERVISOR:
            if self.supervisors.get(hello.pod_index) is peer:
                del self.supervisors[hello.pod_index]
                logger.info("the supervisor of pod %d has gone", hello.pod_index)
        elif self.members[hello.rank].peer is peer:
            self._miss(self.members[hello.rank], self._exits.get(hello.incarnation, "its connection was closed"))
        self._changed()

    def _from_supervisor(self, peer: Peer, message: wire.ProcessExited | wire.Leaving) -> None:
        if isinstance(message, wire.Leaving):
            self._on_leaving(peer.hello.pod_index)
            return
        if not 0 <= message.rank < len(self.members):
            return
        member, text = self.members[message.rank], exit_text(message)
        self._exits = {message.incarnation: text}
        if member.last_incarnation == message.incarnation:
            words = f"rank {message.rank} (pid {message.pid}) {text}"
            self._explain(message.rank, words)
            self._on_exit(message.rank, words)
            if member.peer is not None:
                gone = member.peer
                self._miss(member, text)
                gone.close()
                self._changed()

    def _explain(self, rank: int, words: str) -> None:
        """Better words for a loss that has not been raised yet."""
        for index, one in enumerate(self._evidence):
            if one.rank == rank and one.fault is Fault.RANK_LOST and not one.hearsay:
                self._evidence[index] = replace(one, message=words)

    def _from_worker(self, member: Member, message: wire.FromWorker) -> None:
        match message:
            case wire.StepDone() | wire.Joined() | wire.CacheAllocated() | wire.RendezvousOpened():
                self._answer(member, message)
            case wire.StepFailed():
                self._failed(member, message)
            case wire.Aborted():
                member.set_aborted(message.epoch)
                self._changed()
            case wire.Loaded():
                member.set_loaded(message)
                logger.info("rank %d has its weights: %.1f MB in %.2f s", member.rank, message.weight_bytes / 1e6,
                            message.seconds)  # fmt: skip
                self._changed()
            case wire.LoadProgress():
                member.set_progress(message)
                self._on_change(False)
            case wire.LoadFailed():
                if member.set_failed(message.message):
                    logger.error("rank %d can't load: %s", member.rank, message.message)
                self._changed()

    def _answer(self, member: Member, answer: Answer) -> None:
        question = self._question
        if question is None or type(answer) is not question.kind or answer.epoch != self.epoch:
            return
        if isinstance(answer, wire.StepDone):
            if answer.step != question.step:
                return
            member.stepped(answer, time.time())
        if member.rank in question.ranks:
            question.answers[member.rank] = answer
            if len(question.answers) == len(question.ranks) and not question.done.done():
                question.done.set_result(None)

    def _failed(self, member: Member, message: wire.StepFailed) -> None:
        if message.epoch != self.epoch:
            return
        hearsay = message.fault is Fault.RANK_LOST  # of itself, a rank that speaks can't say so
        self._add(Evidence(message.fault, member.rank, f"rank {member.rank}: {message.message}", hearsay))

    def _miss(self, member: Member, how: str) -> None:
        text = f"rank {member.rank} (pid {member.peer.hello.pid if member.peer else 0}) {how}"
        logger.warning("%s", text)
        member.leave(text)
        if not self._gathering:
            self._add(Evidence(Fault.RANK_LOST, member.rank, text))

    def _add(self, evidence: Evidence) -> None:
        self._evidence.append(evidence)
        if evidence.hearsay:
            asyncio.get_running_loop().call_later(HEARSAY_SECONDS, self._break, self.epoch)
        else:
            self._break(self.epoch)

    def _break(self, epoch: int) -> None:
        if epoch != self.epoch or not self._evidence:
            return
        if self._question is not None and not self._question.done.done():
            self._question.done.set_result(None)
        self._on_break()

    def _changed(self) -> None:
        self._moved.set()
        self._on_change(True)

    # --- the engine's side

    def check(self) -> None:
        """Raise what has come in since the group was formed.

        Raises:
            GroupFaultError: this epoch is over.
        """
        if any(not one.hearsay for one in self._evidence):
            self._raise()

    def _raise(self) -> None:
        self.formed = False
        raise GroupFaultError(diagnose(self._evidence), self._evidence)

    async def form(self) -> Formed:
        """Make the group, under a new epoch; waits for absent and loading ranks for as long as it takes.

        Raises:
            GroupFaultError: a rank was lost or failed after all were there; try again.
        """
        begun = time.monotonic()
        self._patience = ABORT_SECONDS if self._joined else ABORT_JOIN_SECONDS
        self.formed, self._joined, self._gathering = False, False, True
        self._evidence.clear()
        self.epoch += 1
        aborted = await self._gather()
        gathered = time.monotonic()
        self._gathering = False
        blocks, block_size = await self._join()
        self.formed = self._joined = True
        phases = {
            "abort": aborted - begun,
            "respawn": gathered - aborted,
            "rebuild": time.monotonic() - gathered,
        }
        return Formed(self.epoch, blocks, block_size, {name: round(value, 4) for name, value in phases.items()})

    async def _gather(self) -> float:
        """Until every rank is loaded and idle in this epoch. Returns when the survivors were."""
        aborted: float | None = None
        while True:
            self._moved.clear()
            now = time.monotonic()
            self._abort_members(now)
            if aborted is None and not any(member.abort_sent_at for member in self.members):
                aborted = now
            if all(member.idle_epoch >= self.epoch for member in self.members):
                return now if aborted is None else aborted
            try:
                async with asyncio.timeout(0.5):
                    await self._moved.wait()
            except TimeoutError:
                self._kill_stuck(time.monotonic())

    def _abort_members(self, now: float) -> None:
        """Level-triggered: whoever has not been told of this epoch is told."""
        for member in self.members:
            if member.peer is not None and member.welcome_epoch < self.epoch:
                member.welcome_epoch = self.epoch
                member.peer.send(wire.Abort(epoch=self.epoch))
                if member.loaded is not None:
                    member.abort_sent_at = now

    def _kill_stuck(self, now: float) -> None:
        for member in self.members:
            if member.abort_sent_at is not None and now - member.abort_sent_at > self._patience:
                self.kill(member.rank, f"it did not leave its collective within {self._patience:g} s")
                self.on_stuck(member.rank)

    async def _join(self) -> tuple[int, int]:
        everyone = [member.rank for member in self.members]
        opened = await self._ask([0], wire.Rendezvous(epoch=self.epoch), wire.RendezvousOpened, RENDEZVOUS_SECONDS)
        join = wire.Join(epoch=self.epoch, address=opened[0].address)
        await self._ask(everyone, join, wire.Joined, JOIN_SECONDS)
        offers = [member.loaded for member in self.members if member.loaded is not None]
        blocks, block_size = min(one.cache_blocks for one in offers), offers[0].block_size
        allocate = wire.AllocateCache(epoch=self.epoch, blocks=blocks)
        laid_out = await self._ask(everyone, allocate, wire.CacheAllocated, ALLOCATE_SECONDS)
        for member in self.members:
            member.state, member.joined_epoch = RankState.READY, self.epoch
            member.memory_bytes = laid_out[member.rank].memory_bytes
        return blocks, block_size

    async def step(self, sequences: list[wire.SequenceSlice], deadline: float) -> list[wire.SampledToken]:
        """Run one step on every rank and return what rank 0 drew, once all ranks agree.

        Raises:
            GroupFaultError: a rank failed, was lost, differs from the others, or is silent after `deadline` seconds.
        """
        self._step += 1
        step = wire.Step(epoch=self.epoch, step=self._step, sequences=sequences)
        answers = await self._ask([member.rank for member in self.members], step, wire.StepDone, deadline)
        if odd := compare(answers):
            self._evidence.append(odd)
            self._raise()
        return answers[0].sampled

    async def _ask(
        self, ranks: Iterable[int], message: msgspec.Struct, kind: type[_A], seconds: float
    ) -> dict[int, _A]:
        self.check()
        done = asyncio.get_running_loop().create_future()
        step = message.step if isinstance(message, wire.Step) else -1
        self._question = question = _Question(kind, step, frozenset(ranks), done)
        frame = encode(message)
        for rank in question.ranks:
            if peer := self.members[rank].peer:
                peer.send_frame(frame)
        try:
            async with asyncio.timeout(seconds):
                await done
        except TimeoutError:
            missing = sorted(question.ranks - question.answers.keys())
            self._evidence.append(silent(missing, kind.__name__, seconds))
        finally:
            self._question = None
        if len(question.answers) < len(question.ranks):
            self._raise()
        return cast("dict[int, _A]", question.answers)

    def kill(self, rank: int, reason: str) -> None:
        """Have the rank's supervisor end its process; a new one takes its place."""
        member = self.members[rank]
        supervisor = self.supervisors.get(member.pod_index)
        if member.peer is None or supervisor is None:
            return
        logger.warning("killing rank %d: %s", rank, reason)
        member.abort_sent_at = None
        supervisor.send(wire.KillWorker(rank=rank, incarnation=member.peer.hello.incarnation, reason=reason))


def exit_text(message: wire.ProcessExited) -> str:
    """`was killed by SIGKILL`, or `ended with exit code 1`."""
    if message.signal is None:
        return f"ended with exit code {message.exit_code}"
    try:
        name = signal.Signals(message.signal).name
    except ValueError:
        name = f"signal {message.signal}"
    return f"was killed by {name}"
