"""The ranks and the supervisors of their pods, as they come and go: the bus's listener.

What a rank answers goes to the inquiry, and so does its loss, unless the group is being gathered: then processes may
come and go without being missed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable

from lockstep_runtime import wire
from lockstep_runtime.config import ServeConfig
from lockstep_runtime.engine.bus import FromPeer, Peer
from lockstep_runtime.engine.inquiry import Inquiry
from lockstep_runtime.engine.look import Look
from lockstep_runtime.engine.members import Member
from lockstep_runtime.engine.recovery import Evidence
from lockstep_runtime.wire import Fault

logger = logging.getLogger(__name__)


class RankGroup:
    """`on_change(urgent)` is called when the status changed, `on_break` when evidence came in, `on_exit` with a rank
    and what became of its process, `on_leaving` with a pod that was asked to end. While the group is gathered,
    `on_death` is called with a rank whose new process ended before it was loaded, and `on_stuck` with one whose process
    had to be killed; both with a sentence."""

    def __init__(
        self,
        config: ServeConfig,
        *,
        first_epoch: int,
        on_change: Callable[[bool], None],
        on_break: Callable[[], None],
        on_exit: Callable[[int, str], None],
        on_leaving: Callable[[int], None],
        on_death: Callable[[int, str], None],
        on_stuck: Callable[[int, str], None],
    ) -> None:
        self._config = config
        self.members = [
            Member(rank=rank, pod_index=rank // config.ranks_per_pod) for rank in range(config.tensor_parallel_size)
        ]
        self.supervisors: dict[int, Peer] = {}
        self._look = Look(self.supervisors)
        self.inquiry = Inquiry(self.members, self._look, first_epoch, self._broken)
        self.gathering = True  # set by who forms the group: while ranks come and go without being missed
        self._on_change, self._on_break, self._on_exit, self._on_leaving = on_change, on_break, on_exit, on_leaving
        self._on_death, self._on_stuck = on_death, on_stuck
        self._moved = asyncio.Event()
        self._exits: dict[str, str] = {}
        self._problems: dict[int, list[wire.PodProblem]] = {}  # by pod
        self._pods: dict[int, str] = {}  # incarnations of the supervisors

    # --- the bus's listener

    def admit(self, hello: wire.Hello) -> wire.Welcome | wire.Refused:
        """Whether this peer belongs here; the epoch rises above what it has seen under another engine."""
        if reason := self._why_not(hello):
            return wire.Refused(reason=reason, retry=False)
        known = hello.role is wire.Role.WORKER and self.members[hello.rank].last_incarnation == hello.incarnation
        self.inquiry.epoch = max(self.inquiry.epoch, hello.epoch if known else hello.epoch + 1)
        return wire.Welcome(epoch=self.inquiry.epoch)

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
            self._pods[hello.pod_index] = hello.incarnation
            self.supervisors[hello.pod_index] = peer
            logger.info("the supervisor of pod %d (%s) has connected", hello.pod_index, hello.pod)
        else:
            member = self.members[hello.rank]
            if member.peer is not None:
                self._miss(member, "another process has taken its place")
            member.arrive(peer, self.inquiry.epoch)
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
                self._problems.pop(hello.pod_index, None)
                del self.supervisors[hello.pod_index]
                logger.info("the supervisor of pod %d has gone", hello.pod_index)
        elif self.members[hello.rank].peer is peer:
            self._miss(self.members[hello.rank], self._exits.get(hello.incarnation, "lost its connection"))
        self._changed()

    # --- what a rank says

    def _from_worker(self, member: Member, message: wire.FromWorker) -> None:
        match message:
            case wire.StepDone() | wire.Joined() | wire.CacheAllocated() | wire.RendezvousOpened():
                self.inquiry.answered(member, message)
            case wire.StepFailed():
                self.inquiry.failed(member, message)
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
                if member.set_failed(message):
                    logger.error("rank %d can't load (%s): %s", member.rank, message.kind, member.message)
                self._changed()

    # --- what a supervisor says of its pod and its ranks' processes

    def _from_supervisor(self, peer: Peer, message: wire.FromSupervisor) -> None:
        match message:
            case wire.Inject():
                self._inject(message)
            case wire.Leaving():
                self._on_leaving(peer.hello.pod_index)
            case wire.ProgressReport():
                self._look.take(peer.hello.pod_index, message)
            case wire.PodReport():
                self._problems[peer.hello.pod_index] = message.problems
                self._on_change(True)
            case wire.ProcessStopped() if 0 <= message.rank < len(self.members):
                self._process_stopped(message)
            case wire.ProcessExited() if 0 <= message.rank < len(self.members):
                self._process_exited(message)
            case _:
                pass

    def _process_stopped(self, message: wire.ProcessStopped) -> None:
        """It answers nothing until someone lets it go on, which nobody may ever do. A new one may be unknown."""
        rank, member = message.rank, self.members[message.rank]
        if message.incarnation in member.retired or (member.peer and member.last_incarnation != message.incarnation):
            return
        words = f"rank {rank} (pid {message.pid}) was stopped by {signal_name(message.signal)}"
        if self.gathering:
            self.kill_stuck(rank, words, message.incarnation)
        else:
            self.inquiry.add(Evidence(Fault.HANG, rank, words, laggards=(rank,), outside=True))

    def _process_exited(self, message: wire.ProcessExited) -> None:
        member, text = self.members[message.rank], exit_text(message)
        self._exits = {message.incarnation: text}
        member.ended = message.incarnation
        if member.last_incarnation != message.incarnation:
            return
        words = f"rank {message.rank} (pid {message.pid}) {text}"
        self.inquiry.explain(message.rank, words)
        self._on_exit(message.rank, words)
        young = member.loaded is None and member.arrived_epoch >= self.inquiry.epoch
        if self.gathering and young and member.condemned != message.incarnation:
            self._on_death(message.rank, words)
        if gone := member.peer:
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

    def _miss(self, member: Member, how: str) -> None:
        text = f"rank {member.rank} (pid {member.peer.hello.pid if member.peer else 0}) {how}"
        logger.warning("%s", text)
        member.leave(text)
        if not self.gathering:
            self.inquiry.add(Evidence(Fault.RANK_LOST, member.rank, text))

    @property
    def pod_problems(self) -> list[wire.PodProblem]:
        """What the pods' supervisors complain of, in the pods' order."""
        return [problem for _, problems in sorted(self._problems.items()) for problem in problems]

    # --- for whoever forms the group

    def _changed(self) -> None:
        self._moved.set()
        self._on_change(True)

    def _broken(self) -> None:
        self._moved.set()
        self._on_break()

    async def moves(self, seconds: float | None = None) -> None:
        """Wait until a rank or a pod came, went or got further, or evidence came in; so long at most."""
        self._moved.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._moved.wait()

    async def new_pod(self, seconds: float | None) -> bool:
        """Wait until a pod's supervisor has connected that was not there before; False when time is up."""
        before = dict(self._pods)
        try:
            async with asyncio.timeout(seconds):
                while self._pods == before:
                    await self.moves()
        except TimeoutError:
            return False
        return True

    def kill(self, rank: int, reason: str, incarnation: str = "", *, reload: bool = True) -> bool:
        """Have the rank's supervisor end its process, and another takes its place; whether it could be told.

        `incarnation`: of one that may not have connected; else it is the last that has. `reload`: as in
        `wire.KillWorker`.
        """
        member = self.members[rank]
        supervisor = self.supervisors.get(member.pod_index)
        incarnation = incarnation or member.last_incarnation
        if not incarnation or supervisor is None:
            return False
        logger.warning("killing rank %d: %s", rank, reason)
        member.abort_sent_at = None
        member.condemned = incarnation
        supervisor.send(wire.KillWorker(rank=rank, incarnation=incarnation, reason=reason, reload=reload))
        return True

    def kill_stuck(self, rank: int, how: str, incarnation: str = "") -> None:
        """Kill a process that keeps the group from being gathered."""
        if self.kill(rank, how, incarnation, reload=False):
            self._on_stuck(rank, how)


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def exit_text(message: wire.ProcessExited) -> str:
    """`was killed by SIGKILL`, `ended with exit code 1`, or `was killed by the kernel: out of memory (…)`."""
    if message.oom:
        return f"was {message.oom}"
    if message.signal is None:
        return f"ended with exit code {message.exit_code}"
    return f"was killed by {signal_name(message.signal)}"
