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
from lockstep_runtime.engine.deadline import Deadline, Patience, extension
from lockstep_runtime.engine.look import Look
from lockstep_runtime.engine.members import Member
from lockstep_runtime.engine.recovery import Evidence, compare, diagnose, silent
from lockstep_runtime.engine.suspect import Suspicion, suspect
from lockstep_runtime.transport import encode
from lockstep_runtime.wire import Fault, RankState

logger = logging.getLogger(__name__)
_A = TypeVar("_A", wire.RendezvousOpened, wire.Joined, wire.CacheAllocated, wire.StepDone)
Answer = wire.RendezvousOpened | wire.Joined | wire.CacheAllocated | wire.StepDone

RENDEZVOUS: Final = Deadline(15.0, 15.0, extends=False, reason="")
JOIN: Final = Deadline(2.5, 60.0, extends=True, reason="")  # as long as no rank holds up the others
ALLOCATE: Final = Deadline(120.0, 120.0, extends=False, reason="")
ABORT_SECONDS: Final = 1.5  # a rank that has not left its collective by then is killed
ABORT_JOIN_SECONDS: Final = 15.0  # joining can't be interrupted; it ends by itself, sooner than this
HEARSAY_SECONDS: Final = 0.5  # how long to wait for the cause when ranks only report its effect
UNTOUCHED_SECONDS: Final = 0.1  # and for the other ranks to say that they could not begin the step either
RECONNECT_SECONDS: Final = 5.0  # a process whose connection is lost and that does not come back is killed
LOADING_SECONDS: Final = 120.0  # without a byte more
RELOADING_SECONDS: Final = 60.0  # the same where the model is here already: nothing has to be downloaded first


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
    refused: dict[int, Evidence] = field(default_factory=dict)  # by ranks that could not begin

    @property
    def silent(self) -> list[int]:
        return sorted(self.ranks - self.answers.keys())

    def settle(self) -> None:
        if not self.done.done():
            self.done.set_result(None)


class RankGroup:
    """The bus's listener. `on_change(urgent)` is called when the status changed, `on_break` when evidence came in,
    `on_exit` with a rank and what became of its process, `on_leaving` with a pod that was asked to end, `on_phase` with
    a phase of the forming that is over, its seconds and a sentence, `on_death` with a rank whose new process ended
    before it was loaded, though the group has served before."""

    def __init__(
        self,
        config: ServeConfig,
        *,
        first_epoch: int,
        on_change: Callable[[bool], None],
        on_break: Callable[[], None],
        on_exit: Callable[[int, str], None],
        on_leaving: Callable[[int], None],
        on_phase: Callable[[str, float, str], None],
        on_death: Callable[[int, str], None],
    ) -> None:
        self._config = config
        self.members = [
            Member(rank=rank, pod_index=rank // config.ranks_per_pod) for rank in range(config.tensor_parallel_size)
        ]
        self.supervisors: dict[int, Peer] = {}
        self.epoch = first_epoch
        self.formed = False  # and nothing has broken it since
        self._joined = False  # in this epoch, whatever became of it
        self.on_stuck: Callable[[int, str], None] = lambda rank, how: None
        self.pods_seen = 0  # rises with every new supervisor
        self._on_phase, self._on_death = on_phase, on_death
        self._has_served = False
        self._look = Look(self.supervisors)
        self._on_change, self._on_break, self._on_exit, self._on_leaving = on_change, on_break, on_exit, on_leaving
        self._evidence: list[Evidence] = []
        self._gathering = True  # while ranks come and go without being missed
        self._patience = ABORT_SECONDS
        self._moved = asyncio.Event()  # a rank's state changed
        self._question: _Question | None = None
        self._step = 0
        self._exits: dict[str, str] = {}
        self._pods: dict[int, str] = {}  # incarnations of the supervisors

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
            before = self.supervisors.get(hello.pod_index)
            if before is not None:
                before.close()
            if self._pods.get(hello.pod_index) != hello.incarnation:
                self._pods[hello.pod_index] = hello.incarnation
                self.pods_seen += 1
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
        if isinstance(message, wire.FromSupervisor):
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
            self._miss(self.members[hello.rank], self._exits.get(hello.incarnation, "lost its connection"))
        self._changed()

    def _from_supervisor(self, peer: Peer, message: wire.FromSupervisor) -> None:
        match message:
            case wire.Inject():
                self._inject(message)
            case wire.Leaving():
                self._on_leaving(peer.hello.pod_index)
            case wire.ProgressReport():
                self._look.take(peer.hello.pod_index, message)
            case wire.ProcessStopped() if 0 <= message.rank < len(self.members):
                self._process_stopped(message)
            case wire.ProcessExited() if 0 <= message.rank < len(self.members):
                self._process_exited(message)
            case _:
                pass

    def _process_stopped(self, message: wire.ProcessStopped) -> None:
        """It answers nothing until someone lets it go on, which nobody may ever do."""
        member = self.members[message.rank]
        if member.last_incarnation != message.incarnation:
            return
        words = f"rank {message.rank} (pid {message.pid}) was stopped by {signal_name(message.signal)}"
        if self._gathering:
            self.kill(message.rank, words)
            self.on_stuck(message.rank, words)
            return
        laggards = (message.rank,)
        self._add(Evidence(Fault.HANG, message.rank, words, laggards=laggards, outside=True))

    def _process_exited(self, message: wire.ProcessExited) -> None:
        member, text = self.members[message.rank], exit_text(message)
        self._exits = {message.incarnation: text}
        member.ended = message.incarnation
        if member.last_incarnation == message.incarnation:
            words = f"rank {message.rank} (pid {message.pid}) {text}"
            self._explain(message.rank, words)
            self._on_exit(message.rank, words)
            young = member.loaded is None and member.arrived_epoch >= self.epoch
            if self._gathering and self._has_served and young and member.condemned != message.incarnation:
                self._on_death(message.rank, words)
            if member.peer is not None:
                gone = member.peer
                self._miss(member, text)
                gone.close()
                self._changed()

    def _inject(self, fault: wire.Inject) -> None:
        """Hand a fault on purpose to the rank, or to its pod where the rank's next process is to find it."""
        if not self._config.allow_faults or not 0 <= fault.rank < len(self.members):
            return
        member = self.members[fault.rank]
        waits = fault.phase is wire.Phase.LOADING
        if target := self.supervisors.get(member.pod_index) if waits else member.peer:
            target.send(fault)

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
            if len(question.answers) == len(question.ranks):
                question.settle()

    def _failed(self, member: Member, message: wire.StepFailed) -> None:
        if message.epoch != self.epoch:
            return
        hearsay = message.fault is Fault.RANK_LOST  # of itself, a rank that speaks can't say so
        # NaN in one rank's part is NaN in the sum of all: whoever finds it need not be its source.
        suspect = None if message.fault is Fault.NON_FINITE and len(self.members) > 1 else member.rank
        evidence = Evidence(message.fault, suspect, f"rank {member.rank}: {message.message}", hearsay)
        question = self._question
        if message.untouched and message.fault is Fault.STEP_FAILED and question and message.step == question.step:
            self._refuse(question, member.rank, evidence)
        else:
            self._add(evidence)

    def _refuse(self, question: _Question, rank: int, evidence: Evidence) -> None:
        """A rank could not begin the step. When all say so, the step is at fault and the group as good as before."""
        question.refused[rank] = evidence
        if len(question.refused) == len(question.ranks):
            question.settle()
        elif len(question.refused) == 1:
            asyncio.get_running_loop().call_later(UNTOUCHED_SECONDS, self._end_of_refusals, question)

    def _end_of_refusals(self, question: _Question) -> None:
        if self._question is question and len(question.refused) < len(question.ranks):
            for evidence in question.refused.values():
                self._add(evidence)

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
        if self._question is not None:
            self._question.settle()
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

    async def form(self, longest_work: float = 0.0) -> Formed:
        """Make the group, under a new epoch; waits for absent and loading ranks for as long as it takes.

        `longest_work`: seconds that a rank may compute on before it sees that it was aborted.

        Raises:
            GroupFaultError: a rank was lost or failed after all were there; try again.
        """
        begun = time.monotonic()
        self._patience = max(ABORT_SECONDS, longest_work) if self._joined else ABORT_JOIN_SECONDS
        self.formed, self._joined, self._gathering = False, False, True
        self._evidence.clear()
        self.epoch += 1
        aborted = await self._gather()
        gathered = time.monotonic()
        self._gathering = False
        self._on_phase("respawn", gathered - aborted, f"all {len(self.members)} ranks have their weights")
        blocks, block_size = await self._join()
        self._joined = True
        phases = {
            "abort": aborted - begun,
            "respawn": gathered - aborted,
            "rebuild": time.monotonic() - gathered,
        }
        self._on_phase("rebuild", phases["rebuild"], f"a new communicator, and {blocks} blocks of cache on each rank")
        return Formed(self.epoch, blocks, block_size, {name: round(value, 4) for name, value in phases.items()})

    def in_use(self) -> None:
        """The group was proved: it serves from now on."""
        for member in self.members:
            member.state = RankState.READY
        self.formed = self._has_served = True
        self._changed()

    def give_up(self) -> None:
        """Have every rank leave its collectives, and form nothing."""
        self.formed, self._gathering = False, True
        self._evidence.clear()
        self.epoch += 1
        self._abort_members(time.monotonic())

    async def _gather(self) -> float:
        """Until every rank is loaded and idle in this epoch. Returns when the survivors were."""
        aborted: float | None = None
        begun = time.monotonic()
        while True:
            self.check()
            self._moved.clear()
            now = time.monotonic()
            self._abort_members(now)
            if aborted is None and not any(member.abort_sent_at for member in self.members):
                aborted = now
                self._on_phase("abort", aborted - begun, "the ranks that live have left their collectives")
            if all(member.idle_epoch >= self.epoch for member in self.members):
                return now if aborted is None else aborted
            try:
                async with asyncio.timeout(0.25):
                    await self._moved.wait()
            except TimeoutError:
                pass
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
        again = self._has_served
        loading = self._config.watchdog.step_timeout or (RELOADING_SECONDS if again else LOADING_SECONDS)
        for member in self.members:
            if member.abort_sent_at is not None and now - member.abort_sent_at > self._patience:
                how = f"rank {member.rank} did not leave its collective within {self._patience:g} s"
            elif member.is_cut_off(now, RECONNECT_SECONDS):
                how = f"rank {member.rank} lost its connection and did not come back within {RECONNECT_SECONDS:g} s"
            elif member.stands_still(now, loading, again=again):
                how = f"rank {member.rank} has read none of its weights for {loading:g} s"
            else:
                continue
            if self.kill(member.rank, how):
                self.on_stuck(member.rank, how)

    async def _join(self) -> tuple[int, int]:
        everyone = [member.rank for member in self.members]
        opened = await self._ask([0], wire.Rendezvous(epoch=self.epoch), wire.RendezvousOpened, RENDEZVOUS)
        join = wire.Join(epoch=self.epoch, address=opened[0].address)
        await self._ask(everyone, join, wire.Joined, JOIN)
        offers = [member.loaded for member in self.members if member.loaded is not None]
        blocks, block_size = min(one.cache_blocks for one in offers), offers[0].block_size
        allocate = wire.AllocateCache(epoch=self.epoch, blocks=blocks)
        laid_out = await self._ask(everyone, allocate, wire.CacheAllocated, ALLOCATE)
        for member in self.members:
            member.joined_epoch = self.epoch
            member.memory_bytes = laid_out[member.rank].memory_bytes
        return blocks, block_size

    async def step(self, sequences: list[wire.SequenceSlice], deadline: Deadline) -> wire.StepDone:
        """Run one step on every rank and return what rank 0 says of it, once all ranks agree.

        Raises:
            GroupFaultError: a rank failed, was lost, differs from the others, or hangs.
            StepRefusedError: no rank could begin it; the group is as good as before.
        """
        self._step += 1
        step = wire.Step(epoch=self.epoch, step=self._step, sequences=sequences)
        answers = await self._ask([member.rank for member in self.members], step, wire.StepDone, deadline)
        if odd := compare(answers):
            self._evidence.append(odd)
            self._raise()
        return answers[0]

    async def _ask(
        self, ranks: Iterable[int], message: msgspec.Struct, kind: type[_A], deadline: Deadline
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
            await self._watch(question, deadline)
        finally:
            self._question = None
        if len(question.answers) < len(question.ranks):
            if len(question.refused) == len(question.ranks) and not self._evidence:
                raise StepRefusedError(list(question.refused.values()))
            self._raise()
        return cast("dict[int, _A]", question.answers)

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
                records, epoch=self.epoch, step=question.step, silent=question.silent, size=len(self.members)
            )
            if more := self._grace(question, deadline, patience, suspicion):
                patience.extend(more)
                continue
            self._evidence.append(silent(question.silent, question.kind.__name__, patience.waited, suspicion))
            return

    def _grace(self, question: _Question, deadline: Deadline, patience: Patience, suspicion: Suspicion) -> float:
        """Seconds more; 0: it hangs. Ranks that are all joining wait for the network, not for each other."""
        if question.kind is wire.Joined and not suspicion.laggards:
            return min(deadline.seconds, max(0.0, deadline.ceiling - patience.waited))
        return extension(deadline, patience, suspicion.moved_ago)

    async def new_pod(self, seconds: float | None) -> bool:
        """Wait until a pod's supervisor has connected that was not there before; False when time is up."""
        before = self.pods_seen
        try:
            async with asyncio.timeout(seconds):
                while self.pods_seen == before:
                    self._moved.clear()
                    await self._moved.wait()
        except TimeoutError:
            return False
        return True

    def break_off(self, evidence: Evidence) -> None:
        """End what is under way, forming included, with this evidence."""
        self._add(evidence)
        self._moved.set()

    def kill(self, rank: int, reason: str) -> bool:
        """Have the rank's supervisor end its process, and another takes its place; whether it could be told."""
        member = self.members[rank]
        supervisor = self.supervisors.get(member.pod_index)
        if not member.last_incarnation or supervisor is None:
            return False
        logger.warning("killing rank %d: %s", rank, reason)
        member.abort_sent_at = None
        member.condemned = member.last_incarnation
        supervisor.send(wire.KillWorker(rank=rank, incarnation=member.last_incarnation, reason=reason))
        return True


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def exit_text(message: wire.ProcessExited) -> str:
    """`was killed by SIGKILL`, or `ended with exit code 1`."""
    if message.signal is None:
        return f"ended with exit code {message.exit_code}"
    return f"was killed by {signal_name(message.signal)}"
