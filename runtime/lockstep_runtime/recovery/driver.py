"""Carries the coordinator out: messages of the bus become its events, its actions messages, calls and log lines.

It is the bus's listener, and what the engine knows of its ranks. All on one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from lockstep_runtime import log
from lockstep_runtime.config import ServeConfig
from lockstep_runtime.host.addresses import join
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.chaos import FaultPhase, Inject
from lockstep_runtime.protocol.images import Pixels
from lockstep_runtime.protocol.status import GroupStatus, PodProblem
from lockstep_runtime.protocol.step import SequenceSlice
from lockstep_runtime.recovery.actions import (
    Accuse,
    Action,
    AllocateCaches,
    Ask,
    BeginEpoch,
    CloseConnection,
    DeclarePoisoned,
    Kill,
    PhaseOver,
    ProcessesChanged,
    RefineFault,
    ReportDeparture,
    ReportFault,
    Resume,
    RunStep,
    SendAbort,
)
from lockstep_runtime.recovery.bus_server import FromPeer, Peer
from lockstep_runtime.recovery.changes import Changes
from lockstep_runtime.recovery.coordinator import Coordinator
from lockstep_runtime.recovery.departures import Departures
from lockstep_runtime.recovery.diagnosis import Evidence
from lockstep_runtime.recovery.events import (
    Answer,
    CallDone,
    Event,
    GroupFault,
    ModelRead,
    PodConnected,
    PodDisconnected,
    PodReleased,
    RankConnected,
    RankDisconnected,
    RankExited,
    RankReported,
    RankStopped,
)
from lockstep_runtime.recovery.exits import exit_text, signal_name
from lockstep_runtime.recovery.fault_log import FaultLog
from lockstep_runtime.recovery.fault_recorder import FaultRecorder
from lockstep_runtime.recovery.image_courier import ImageCourier
from lockstep_runtime.recovery.progress_query import ProgressQuery
from lockstep_runtime.recovery.rank_rpc import GroupFaultError, RankRpc, StepRefusedError
from lockstep_runtime.recovery.stage import Stage
from lockstep_runtime.recovery.timing import LONGEST_ABORT_SECONDS, timing_of
from lockstep_runtime.recovery.watchdog import DeadlineModel, Work, work_of

logger = logging.getLogger(__name__)

_UNREPORTED: Final = (Ask, AllocateCaches, RunStep, PhaseOver, ProcessesChanged)  # the status says nothing of them


class Requests(Protocol):
    """The requests, as the group sees them."""

    def in_caches(self) -> list[SequenceSlice]:
        """What the caches hold: of each sequence its last computed token."""

    def resume(self, resumed: Resume) -> int:
        """The group serves from now on; returns how many requests go on."""

    def poisoned(self, reason: str) -> None:
        """The group can't serve and can't heal itself."""

    async def finished(self) -> None:
        """Wait until no request runs."""


class GroupDriver:
    """`wake` is set when evidence against the group comes in; `serving` is set while steps of requests may be run."""

    def __init__(
        self,
        config: ServeConfig,
        requests: Requests,
        wake: asyncio.Event,
        changes: Changes,
        history: GroupStatus | None,
    ) -> None:
        self._config, self._requests, self._changes = config, requests, changes
        self.coordinator = Coordinator(config, timing_of(config), history.epoch if history else 0)
        self.faults = FaultLog(history.faults if history else [], history.recoveries if history else 0)
        self._recorder = FaultRecorder(self.faults)
        self.supervisors: dict[int, Peer] = {}  # by pod
        self.serving = asyncio.Event()
        self.draining = False  # then no pod is released before the requests are done
        self.departures = Departures(config.lame_duck_seconds, requests.finished, self._let_go)
        self._peers: dict[int, Peer] = {}  # by rank
        self._progress = ProgressQuery(self.supervisors)
        self._rpc = RankRpc(self.coordinator, self._peers, self._progress, wake)
        self._courier = ImageCourier(self._peers)
        self._deadlines = DeadlineModel(config.watchdog)
        self._commit = config.model_commit or ""  # of the hub's model
        self._problems: dict[int, list[PodProblem]] = {}  # by pod
        self._work: Work | None = None  # of the last step
        self._tasks: asyncio.TaskGroup
        self._rearm = asyncio.Event()
        self._started = time.monotonic()

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as self._tasks:
            self._execute(self.coordinator.start(time.monotonic()))
            while True:
                self._rearm.clear()
                due = self.coordinator.next_deadline()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(None if due is None else max(0.0, due - time.monotonic())):
                        await self._rearm.wait()
                if actions := self.coordinator.tick(time.monotonic()):
                    self._execute(actions)

    # --- for the engine

    @property
    def pod_problems(self) -> list[PodProblem]:
        """What the pods' supervisors complain of, in the pods' order."""
        return [problem for _, problems in sorted(self._problems.items()) for problem in problems]

    async def step(
        self, slices: Sequence[SequenceSlice], images: bus.ImageWork = bus.NO_IMAGES, pixels: Sequence[Pixels] = ()
    ) -> tuple[bus.StepDone, float]:
        """Run one step under its deadline, with the pixels that it is to encode; returns the result and its seconds,
        from which later deadlines are learned.

        Raises:
            GroupFaultError: the group can't continue; the caller reports it by `broken`.
            StepRefusedError: no rank could begin it; the group is unharmed.
        """
        self._work = work = work_of(slices, pixels)
        self._courier.dropped(set(images.drop) - set(images.encode))
        self._courier.deliver(pixels)
        begun = time.monotonic()
        done = await self._rpc.step(list(slices), lambda: self._deadlines.deadline(work), images)
        seconds = time.monotonic() - begun
        self._deadlines.learn(work, seconds)
        return done, seconds

    def check(self) -> None:
        """Raise GroupFaultError if there is evidence against the group."""
        self._rpc.check()

    def broken(self, fault: GroupFaultError, *, by_request: bool, steps: int) -> None:
        """A step of requests has failed; `steps` were done since the group resumed."""
        self._handle(GroupFault(fault.cause, fault.evidence, by_request, steps, self._under_way()))

    def drop(self, cause: Evidence) -> None:
        """A request was given up, and nothing else happened."""
        self._recorder.drop(cause, self.coordinator.epoch)

    def set_commit(self, commit: str) -> None:
        """Tell every pod, also those that connect later, which commit of the hub's model it is to load."""
        self._commit = commit
        for supervisor in self.supervisors.values():
            supervisor.send(bus.ModelCommit(commit=commit))

    def model_read(self) -> None:
        """The model's configuration is known."""
        self._handle(ModelRead())

    def release(self) -> None:
        """Release every pod."""
        for supervisor in self.supervisors.values():
            supervisor.send(bus.Release())

    # --- the bus's listener

    def admit(self, hello: bus.Hello) -> bus.Welcome | bus.Refused:
        return self.coordinator.admit(hello)

    def connected(self, peer: Peer) -> None:
        hello = peer.hello
        if hello.role is bus.Role.SUPERVISOR:
            before, self.supervisors[hello.pod_index] = self.supervisors.get(hello.pod_index), peer
            logger.info("the supervisor of pod %d (%s) has connected", hello.pod_index, hello.pod)
            if self._commit:
                peer.send(bus.ModelCommit(commit=self._commit))
            self.departures.gone(hello.pod_index, serves=self.stage is Stage.SERVING)
            event: Event = PodConnected(hello.pod_index, hello.incarnation)
        else:
            before, self._peers[hello.rank] = self._peers.get(hello.rank), peer
            about = log.fields(rank=hello.rank, epoch=hello.epoch)
            logger.info("rank %d has connected (pid %d, pod %s)", hello.rank, hello.pid, hello.pod, extra=about)
            event = RankConnected(hello)
        if before is not None:
            before.close()
        self._handle(event)

    def lost(self, peer: Peer) -> None:
        hello = peer.hello
        if hello.role is bus.Role.SUPERVISOR:
            if self.supervisors.get(hello.pod_index) is peer:
                del self.supervisors[hello.pod_index]
                self._problems.pop(hello.pod_index, None)
                logger.info("the supervisor of pod %d has gone", hello.pod_index)
                self.departures.gone(hello.pod_index, serves=False)
                self._handle(PodDisconnected(hello.pod_index))
        elif self._peers.get(hello.rank) is peer:
            del self._peers[hello.rank]
            self._handle(RankDisconnected(hello.rank))

    def received(self, peer: Peer, message: FromPeer) -> None:
        if isinstance(message, bus.FromSupervisor):
            self._from_supervisor(peer, message)
        elif self._peers.get(peer.hello.rank) is peer:  # else it is what a replaced connection had still under way
            self._from_worker(peer.hello.rank, message)

    def _from_worker(self, rank: int, message: bus.FromWorker) -> None:
        match message:
            case bus.StepFailed():
                self._rpc.failed(rank, message)
            case bus.LoadProgress():
                self._handle(RankReported(rank, message), urgent=False)
            case bus.Aborted() | bus.Loaded() | bus.LoadFailed():
                self._handle(RankReported(rank, message))
            case _:
                self._rpc.answered(rank, message)

    def _from_supervisor(self, peer: Peer, message: bus.FromSupervisor) -> None:
        pod_index = peer.hello.pod_index
        match message:
            case Inject():
                self._inject(message)
            case bus.Leaving():
                self._see_off(pod_index, message.grace_seconds)
            case bus.ProgressReport():
                self._progress.take(pod_index, message)
            case bus.PodReport():
                self._problems[pod_index] = message.problems
                self._changes.tell()
            case bus.ProcessStopped() if self._is_of(message.rank, pod_index):
                self._handle(RankStopped(message.rank, message.incarnation, message.pid, signal_name(message.signal)))
            case bus.ProcessExited() if self._is_of(message.rank, pod_index):
                self._handle(RankExited(message.rank, message.incarnation, message.pid, exit_text(message)))
            case _:
                pass

    def _is_of(self, rank: int, pod_index: int) -> bool:
        handles = self.coordinator.handles
        return 0 <= rank < len(handles) and handles[rank].pod_index == pod_index

    def _see_off(self, pod_index: int, grace_seconds: float) -> None:
        """A member pod was asked to end. A group that doesn't serve has nothing to finish."""
        if self.stage is Stage.SERVING:
            logger.info("pod %d was asked to end: the group drains", pod_index)
            self.departures.begin(pod_index)
            self._changes.tell()
        self._tasks.create_task(self.departures.see_off(pod_index, grace_seconds))

    def _let_go(self, pod_index: int) -> None:
        """When all pods were asked to end, our own drain has begun by now."""
        if self.draining:
            return  # its rank is needed until the running requests are done; `release` follows
        logger.info("pod %d is released", pod_index)
        self._handle(PodReleased(pod_index))
        if supervisor := self.supervisors.get(pod_index):
            supervisor.send(bus.Release())

    def _inject(self, fault: Inject) -> None:
        """Hand a fault on purpose to the rank, or to its pod where the rank's next process is to find it."""
        handles = self.coordinator.handles
        if not self._config.allow_faults or not 0 <= fault.rank < len(handles):
            return
        waits = fault.phase is FaultPhase.LOADING
        pod = self.supervisors.get(handles[fault.rank].pod_index)
        if target := pod if waits else self._peers.get(fault.rank):
            target.send(fault)

    # --- events in, actions out

    def _handle(self, event: Event, *, urgent: bool = True) -> None:
        self._execute(self.coordinator.handle(event, time.monotonic()), urgent=urgent)
        self._rearm.set()

    def _execute(self, actions: Sequence[Action], *, urgent: bool = True) -> None:
        for action in actions:
            self.act(action)
        self._changes.tell(urgent=urgent or not all(isinstance(action, _UNREPORTED) for action in actions))

    def act(self, action: Action) -> None:
        match action:
            case BeginEpoch():
                self._rpc.begin_epoch()
            case SendAbort():
                if peer := self._peers.get(action.rank):
                    peer.send(bus.Abort(epoch=action.epoch))
            case CloseConnection():
                if peer := self._peers.pop(action.rank, None):
                    peer.close()
            case Kill():
                self._kill(action)
            case Ask() | AllocateCaches() | RunStep():
                self._tasks.create_task(self._call(action))
            case Accuse():
                self._rpc.add(action.evidence)
            case ProcessesChanged():
                self._deadlines.processes_changed()
            case Resume():
                self._resume(action)
            case DeclarePoisoned():
                self._requests.poisoned(action.reason)
            case RefineFault():
                self._rpc.refine(action.before, action.message)
                self.faults.refine(action.before, action.message)
            case ReportDeparture():
                self.serving.clear()
                self._recorder.record(action, self.coordinator.epoch)
            case ReportFault():
                self.serving.clear()
                self._recorder.report(action)
            case _:
                self._recorder.record(action, self.coordinator.epoch)

    def _kill(self, kill: Kill) -> None:
        logger.warning("killing rank %d: %s", kill.rank, kill.reason, extra=log.fields(rank=kill.rank))
        if supervisor := self.supervisors.get(self.coordinator.handles[kill.rank].pod_index):
            supervisor.send(
                bus.KillWorker(rank=kill.rank, incarnation=kill.incarnation, reason=kill.reason, reload=kill.reload)
            )

    async def _call(self, action: Ask | AllocateCaches | RunStep) -> None:
        epoch = self.coordinator.epoch
        try:
            event: Event = CallDone(await self._answers(action))
        except GroupFaultError as fault:
            event = GroupFault(fault.cause, fault.evidence, under_way=self._under_way())
        except StepRefusedError as refusal:
            event = GroupFault(refusal.evidence[0], refusal.evidence, under_way=self._under_way())
        if epoch == self.coordinator.epoch:
            self._handle(event, urgent=not isinstance(event, CallDone))

    async def _answers(self, action: Ask | AllocateCaches | RunStep) -> Mapping[int, Answer]:
        everyone = range(len(self.coordinator.handles))
        match action:
            case Ask():
                ranks = everyone if action.ranks is None else action.ranks
                return await self._rpc.call_all(ranks, action.message, action.answer, action.deadline)
            case AllocateCaches():
                unverified = self._requests.in_caches() if action.check else []
                order = bus.AllocateCache(
                    epoch=action.epoch, blocks=action.blocks, state_slots=action.state_slots, unverified=unverified
                )
                return await self._rpc.call_all(everyone, order, bus.CacheAllocated, action.deadline)
            case RunStep():
                return {0: (await self.step(action.slices))[0]}

    def _under_way(self) -> float:
        """Seconds that a rank may compute on before it sees that it was aborted."""
        expected = self._deadlines.expected(self._work) if self._work else None
        return min(LONGEST_ABORT_SECONDS, expected or 0.0)

    def _resume(self, resumed: Resume) -> None:
        count = self._requests.resume(resumed)
        seconds = sum(resumed.phases.values())
        if resumed.first:
            times = ", ".join(f"{name} {value:.2f} s" for name, value in resumed.phases.items())
            url = f"http://{join(self._config.host, self._config.api_port)}"
            logger.info("ready: %s after %.1f s (%s)", url, time.monotonic() - self._started, times)
        else:
            self._recorder.resumed(resumed, count, seconds)
        self.faults.repaired(dict(resumed.phases), at=time.time(), resumed=count, respawned=resumed.respawned)
        self.departures.whole()
        self.serving.set()

    @property
    def stage(self) -> Stage:
        return self.coordinator.stage
