"""The group's life. Pure: events and `now` in, actions out; nothing here waits, sends or reads a clock.

    PAUSING → GATHERING → OPENING → JOINING → ALLOCATING → TESTING → … → SERVING
       ↑__________________________ a fault _______________________________|
                                      ↓ no rung of the ladder is left
                                  POISONED

Every stage ends: by what it waits for, or by a deadline, which leads to a fault, and that to the ladder, whose budgets
end in POISONED, which tries again by itself ever more seldom. What the stages wait for, and what follows:

| stage | until | its deadline, and what follows it |
|---|---|---|
| PAUSING | |  `RETRY_SECONDS`: GATHERING |
| GATHERING | every rank is loaded and idle | each rank's own: it is killed, which is charged; then POISONED |
| OPENING … WARMING | the ranks' answers | the call's: a fault |
| WAITING | the model's configuration | `MODEL_SECONDS`: still waits, and the group says `Failed` |
| SERVING | a fault | that of each step |
| POISONED | a new pod | `POISONED_SECONDS`: PAUSING, with new processes; by strategy RecyclePods the operator's |
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final, cast

from lockstep_runtime import wire
from lockstep_runtime.config import ServeConfig
from lockstep_runtime.recovery.actions import (
    Accuse,
    Action,
    AllocateCaches,
    Ask,
    AttributeNaN,
    BeginEpoch,
    CloseConnection,
    DeclarePoisoned,
    Kill,
    Log,
    NameCulprit,
    PhaseOver,
    ProcessesChanged,
    RefineFault,
    ReportFault,
    Resume,
    RunStep,
    SendAbort,
    StatusChanged,
)
from lockstep_runtime.recovery.admission import refusal
from lockstep_runtime.recovery.bounded import bounded
from lockstep_runtime.recovery.cache_plan import CachePlan
from lockstep_runtime.recovery.diagnosis import Evidence
from lockstep_runtime.recovery.events import (
    Answer,
    CallDone,
    Event,
    GroupFault,
    ModelRead,
    PodConnected,
    PodDisconnected,
    RankConnected,
    RankDisconnected,
    RankExited,
    RankReported,
    RankStopped,
)
from lockstep_runtime.recovery.gathering import Gathering
from lockstep_runtime.recovery.policy import RecoveryPolicy, invalidates_caches, requires_cache_check
from lockstep_runtime.recovery.rank_handle import RankHandle
from lockstep_runtime.recovery.self_test import PROBE_BLOCKS, probe, warmup_step
from lockstep_runtime.recovery.timing import (
    ACCEPTING_SECONDS,
    ALLOCATE,
    MODEL_SECONDS,
    RENDEZVOUS,
    SCRUB,
    Timing,
)
from lockstep_runtime.recovery.verification import Verdict, Verification
from lockstep_runtime.wire import Fault, RankState


class Stage(enum.StrEnum):
    """Where the group's life stands."""

    PAUSING = "pausing"  # between two attempts
    GATHERING = "gathering"  # ranks leave their collectives, come back and load
    OPENING = "opening"  # rank 0 opens the rendezvous
    JOINING = "joining"
    ALLOCATING = "allocating"  # caches
    TESTING = "testing"  # the probe
    SCRUBBING = "scrubbing"  # the probe differs every time: are the weights what was loaded?
    WARMING = "warming"  # a first prefill
    WAITING = "waiting"  # for the model's configuration
    SERVING = "serving"
    POISONED = "poisoned"


_APART: Final = (Stage.PAUSING, Stage.GATHERING, Stage.POISONED)  # ranks come and go without being missed


class Coordinator:
    """Of one group. `epoch` rises with every attempt to form it, and above whatever its ranks have seen before."""

    def __init__(self, config: ServeConfig, timing: Timing, first_epoch: int) -> None:
        self.handles = [
            RankHandle(rank=rank, pod_index=rank // config.ranks_per_pod) for rank in range(config.tensor_parallel_size)
        ]
        self.policy = RecoveryPolicy(config.tensor_parallel_size, config.recovery_strategy)
        self.epoch = first_epoch
        self.stage = Stage.PAUSING
        self.since = 0.0  # when the stage began
        self.has_served = False
        self.accepting_until: float | None = None  # requests are, while it recovers
        self.poison = ""  # why the group can't heal itself
        self.model = config.model
        self._config, self._timing = config, timing
        self._tries_again = config.recovery_strategy == "Ladder"
        self._due: float | None = None  # of the stage, where the ranks have none of their own
        self._actions: list[Action] = []
        self._verification = Verification()
        self._caches = CachePlan()
        self._pods: dict[int, str] = {}  # incarnations of the supervisors that are connected
        self._known_pods: dict[int, str] = {}  # the last ones
        self._failures = 0  # attempts in a row after which no step was done
        self._poisonings = 0  # the same
        self._longest_load = 0.0  # seconds
        self._model_known = False
        # of the attempt
        self._joined = False  # in this epoch, whatever became of it
        self._under_way = 0.0  # seconds that a rank may compute on though it was aborted
        self._suspects: frozenset[int] = frozenset()
        self._gathering: Gathering
        self._aborted_at: float | None = None
        self._gathered_at = 0.0
        self._tested_at = 0.0  # when the test began
        self._phases: dict[str, float] = {}
        # what the caches are
        self._unverified = False  # they may hold garbage
        self._contents: tuple[str, ...] = ()  # by rank, in which the sequences stand
        self._processes: list[str] = []  # incarnations with which it served last
        self._laid_out: tuple[str, ...] = ()  # what the caches are by this attempt

    @property
    def is_apart(self) -> bool:
        """Whether ranks may come and go without being missed."""
        return self.stage in _APART

    # --- admission

    def admit(self, hello: wire.Hello) -> wire.Welcome | wire.Refused:
        """Whether this peer belongs here; the epoch rises above what it has seen under another engine."""
        if reason := refusal(hello, self._config, self.handles):
            return wire.Refused(reason=reason, retry=False)
        known = hello.role is wire.Role.WORKER and self.handles[hello.rank].last_incarnation == hello.incarnation
        self.epoch = max(self.epoch, hello.epoch if known else hello.epoch + 1)
        return wire.Welcome(epoch=self.epoch)

    # --- events in, actions out

    def start(self, now: float) -> list[Action]:
        """Form the group for the first time."""
        self._enter(Stage.PAUSING, now, 0.0)
        return self.tick(now)

    def handle(self, event: Event, now: float) -> list[Action]:
        """What an event leads to."""
        match event:
            case RankConnected():
                self._on_connected(event, now)
            case RankDisconnected():
                self._miss(self.handles[event.rank], "lost its connection", now)
            case RankReported():
                self._on_report(self.handles[event.rank], event, now)
            case RankExited():
                self._on_exit(event, now)
            case RankStopped():
                self._on_stopped(event, now)
            case PodConnected():
                self._on_pod(event, now)
            case PodDisconnected():
                self._pods.pop(event.pod_index, None)
            case CallDone():
                self._on_done(event.answers, now)
            case GroupFault():
                self._on_fault(event, now)
            case ModelRead():
                self._model_known = True
                if self.stage is Stage.WAITING:
                    self._serve(now)
        return self.tick(now)

    def tick(self, now: float) -> list[Action]:
        """Do what is due."""
        if self._due is not None and now >= self._due:
            self._due = None
            self._on_due(now)
        if self.stage is Stage.GATHERING:
            self._gather_on(now)
        if self.accepting_until is not None and now >= self.accepting_until:
            self.accepting_until = None
            self._do(StatusChanged())
        actions, self._actions = self._actions, []
        return actions

    def next_deadline(self) -> float | None:
        """When `tick` has something to do next; None: never, by itself."""
        times = [self._due, self.accepting_until]
        if self.stage is Stage.GATHERING:
            times.append(self._gathering.next_deadline())
        return min((one for one in times if one is not None), default=None)

    def _do(self, action: Action) -> None:
        self._actions.append(action)

    def _enter(self, stage: Stage, now: float, seconds: float | None = None) -> None:
        self.stage, self.since = stage, now
        self._due = None if seconds is None else now + seconds

    def _on_due(self, now: float) -> None:
        match self.stage:
            case Stage.PAUSING:
                self._gather(now)
            case Stage.ALLOCATING:
                self._allocate(now)
            case Stage.POISONED:
                self._renew(now)
            case _:  # WAITING: from now on the state says so
                self._do(StatusChanged())

    # --- ranks and pods come and go

    def _on_connected(self, event: RankConnected, now: float) -> None:
        handle = self.handles[event.hello.rank]
        if handle.hello is not None:
            self._miss(handle, "another process has taken its place", now)
        handle.arrive(event.hello, self.epoch, now)

    def _miss(self, handle: RankHandle, how: str, now: float) -> None:
        text = f"rank {handle.rank} (pid {handle.hello.pid if handle.hello else 0}) {how}"
        self._do(Log(text))
        handle.leave(text, now)
        if self.stage is Stage.WAITING:
            self._fault(Evidence(Fault.RANK_LOST, handle.rank, text), now)
        elif not self.is_apart:
            self._do(Accuse(Evidence(Fault.RANK_LOST, handle.rank, text)))

    def _on_exit(self, event: RankExited, now: float) -> None:
        handle = self.handles[event.rank]
        handle.ended = event.incarnation
        if handle.last_incarnation != event.incarnation:
            return
        words = f"rank {event.rank} (pid {event.pid}) {event.how}"
        self._do(RefineFault(event.rank, words))
        young = handle.loaded is None and handle.arrived_epoch >= self.epoch
        if handle.hello is not None:
            self._miss(handle, event.how, now)
            self._do(CloseConnection(handle.rank))
        if young and handle.being_killed != event.incarnation:
            self._on_early_exit(handle, words, now)

    def _on_early_exit(self, handle: RankHandle, words: str, now: float) -> None:
        """A process ended before it was loaded. A first load that fails with words may do so any number of times."""
        if self.stage not in (Stage.PAUSING, Stage.GATHERING):
            return
        if not self.has_served and handle.state is RankState.FAILED:
            return
        words = f"{words} before it was loaded"
        self._do(Log(words, phase="respawn"))
        self._charge(handle, words, now)

    def _on_stopped(self, event: RankStopped, now: float) -> None:
        """It answers nothing until someone lets it go on, which nobody may ever do. A new one may be unknown."""
        handle = self.handles[event.rank]
        is_other = handle.hello is not None and handle.last_incarnation != event.incarnation
        if event.incarnation in handle.past_incarnations or is_other:
            return
        words = f"rank {event.rank} (pid {event.pid}) was stopped by {event.signal}"
        evidence = Evidence(Fault.HANG, event.rank, words, stragglers=(event.rank,), outside=True)
        if self.is_apart:
            self._kill_unresponsive(handle, words, now, event.incarnation)
        elif self.stage is Stage.WAITING:
            self._fault(evidence, now)
        else:
            self._do(Accuse(evidence))

    def _on_pod(self, event: PodConnected, now: float) -> None:
        is_new = self._known_pods.get(event.pod_index) != event.incarnation
        was_away = event.pod_index not in self._pods
        self._pods[event.pod_index] = self._known_pods[event.pod_index] = event.incarnation
        if self.stage is Stage.POISONED and (is_new or was_away):
            self._try_again(now)

    def _on_report(self, handle: RankHandle, event: RankReported, now: float) -> None:
        match event.report:
            case wire.Aborted(epoch=epoch):
                handle.set_aborted(epoch)
            case wire.Loaded() as loaded:
                handle.set_loaded(loaded)
                megabytes = loaded.weight_bytes / 1e6
                self._do(
                    Log(f"rank {handle.rank} has its weights: {megabytes:.1f} MB in {loaded.seconds:.2f} s", quiet=True)
                )
            case wire.LoadFailed() as failure:
                if handle.set_failed(failure):
                    self._do(Log(f"rank {handle.rank} can't load ({failure.kind}): {handle.message}"))
            case wire.LoadProgress() as progress:
                before = handle.heard_at
                handle.set_progress(progress, now)
                if handle.heard_at > before:
                    self._spread_progress(handle, now)

    def _spread_progress(self, mover: RankHandle, now: float) -> None:
        """Ranks of a pod that have not begun to load may wait for one of them, which downloads for all."""
        for handle in self.handles:
            if handle.pod_index == mover.pod_index and handle.state is RankState.STARTING:
                handle.heard_at = handle.furthest_at = now

    # --- a fault, and what is decided about it

    def _on_fault(self, fault: GroupFault, now: float) -> None:
        if self.is_apart:
            return  # of an epoch that is over
        cause = fault.cause
        was_serving = self.stage is Stage.SERVING
        self._under_way = fault.under_way
        if was_serving:
            self.policy.credit_healthy_time(now - self.since - cause.waited, steps=fault.steps > 0)
            self.accepting_until = now + ACCEPTING_SECONDS
        if fault.steps:
            self._failures = self._poisonings = 0
        else:
            self._failures += 1
        self._decide(fault, now, reload=cause.fault is not Fault.HANG or not was_serving)

    def _fault(self, cause: Evidence, now: float) -> None:
        """One that no call has failed with."""
        self._failures += 1
        self._decide(GroupFault(cause, (cause,)), now, reload=True)

    def _decide(self, fault: GroupFault, now: float, *, reload: bool) -> None:
        if invalidates_caches(fault.evidence):
            self._contents = ()
        self._unverified |= requires_cache_check(fault.evidence)
        decision = self.policy.decide(fault.cause, fault.evidence, by_request=fault.by_request)
        recorded = self.has_served or decision.rung is None
        named = () if fault.cause.rank is None else (fault.cause.rank,)
        self._suspects = frozenset({*fault.cause.stragglers, *named})
        self._do(ReportFault(fault.cause, fault.evidence, decision, self.epoch, recorded))
        for rank in decision.kill:
            self._kill(self.handles[rank], decision.reason, now, reload=reload)
        if decision.rung is None:
            self._enter_poisoned(decision.reason, now)
        else:
            self._enter(Stage.PAUSING, now, self._timing.retry(self._failures))

    def _charge(self, handle: RankHandle, how: str, now: float) -> None:
        """A process was lost, or had to be killed, on the way: when that was once too often, the group gives up."""
        if not self.policy.charge_respawn():
            self._fault(Evidence(Fault.RANK_LOST, handle.rank, f"{how}, again and again", final=True), now)

    def _can_kill(self, handle: RankHandle) -> bool:
        return handle.pod_index in self._pods and bool(handle.last_incarnation)

    def _kill(self, handle: RankHandle, reason: str, now: float, incarnation: str = "", *, reload: bool = True) -> bool:
        """Whether its supervisor could be told. `incarnation`: of one that may not have connected."""
        incarnation = incarnation or handle.last_incarnation
        if not incarnation or handle.pod_index not in self._pods:
            return False
        handle.set_killed(incarnation, now)
        self._do(Kill(handle.rank, incarnation, reason, reload))
        return True

    def _kill_unresponsive(self, handle: RankHandle, how: str, now: float, incarnation: str = "") -> None:
        """Kill a process that keeps the group from being formed."""
        if self._kill(handle, how, now, incarnation, reload=False):
            self._do(NameCulprit(handle.rank, f"{how} and was killed"))
            if self.stage is not Stage.POISONED:
                self._charge(handle, how, now)

    # --- poisoned

    def _enter_poisoned(self, reason: str, now: float) -> None:
        """Leave every collective, say so, and wait for a new pod or, by the ladder, for the next try."""
        self._poisonings += 1
        patience = self._timing.poisoned(self._poisonings) if self._tries_again else None
        self._enter(Stage.POISONED, now, patience)
        self.poison = bounded(reason)
        self._begin_epoch()
        self._send_aborts(now)
        self._do(DeclarePoisoned(self.poison))

    def _renew(self, now: float) -> None:
        """Time is up: try again, with new processes. A first download goes on."""
        seconds = now - self.since
        for handle in self.handles:
            if self.has_served or handle.stall_due(self._timing.loading(0.0, has_served=False)) is None:
                self._kill(handle, f"the group was poisoned for {seconds:g} s and tries again", now)
        self._try_again(now)

    def _try_again(self, now: float) -> None:
        self.poison = ""
        self._caches.forget()
        for handle in self.handles:
            handle.load_failure = None
        self._enter(Stage.PAUSING, now, 0.0)

    # --- gathering

    def _begin_epoch(self) -> None:
        self.epoch += 1
        self._do(BeginEpoch(self.epoch))

    def _gather(self, now: float) -> None:
        self._enter(Stage.GATHERING, now)
        self._begin_epoch()
        backend = self._timing.backend
        self._gathering = Gathering(
            handles=self.handles,
            timing=self._timing,
            since=now,
            has_served=self.has_served,
            abort_seconds=max(backend.abort, self._under_way) if self._joined else backend.abort_joining,
            suspects=self._suspects,
            longest_load=self._longest_load,
            can_kill=self._can_kill,
        )
        self._joined, self._aborted_at = False, None
        for handle in self.handles:
            handle.begin_forming(now)

    def _gather_on(self, now: float) -> None:
        """Level-triggered: whoever has not been told of this epoch is told, whoever is late is killed."""
        self._send_aborts(now)
        if self._aborted_at is None and all(handle.abort_sent_at is None for handle in self.handles):
            self._aborted_at = now
            self._phase("abort", now - self.since, "the ranks that live have left their collectives")
        if all(handle.idle_epoch >= self.epoch for handle in self.handles):
            self._open(now)
            return
        for handle, how in self._gathering.late(now):
            self._kill_unresponsive(handle, how, now)
            if self.stage is not Stage.GATHERING:
                return
        if final := self._gathering.hopeless(now):
            self._fault(final, now)

    def _send_aborts(self, now: float) -> None:
        for handle in self.handles:
            if handle.hello is not None and handle.welcome_epoch < self.epoch:
                handle.welcome_epoch = self.epoch
                self._do(SendAbort(handle.rank, self.epoch))
                if handle.loaded is not None:
                    handle.abort_sent_at = now

    # --- from loaded ranks to a group that serves

    def _open(self, now: float) -> None:
        aborted = now if self._aborted_at is None else self._aborted_at
        self._gathered_at = now
        self._phases = {"abort": aborted - self.since, "respawn": now - aborted}
        loads = [one.loaded.seconds for one in self.handles if one.loaded is not None]
        self._longest_load = max([self._longest_load, *loads])
        self._phase("respawn", now - aborted, f"all {len(self.handles)} ranks have their weights")
        self._enter(Stage.OPENING, now)
        self._do(Ask(wire.Rendezvous(epoch=self.epoch), wire.RendezvousOpened, RENDEZVOUS, ranks=(0,)))

    def _on_done(self, answers: Mapping[int, Answer], now: float) -> None:
        match self.stage:
            case Stage.OPENING:
                opened = cast("wire.RendezvousOpened", answers[0])
                self._enter(Stage.JOINING, now)
                join = wire.Join(epoch=self.epoch, address=opened.address)
                self._do(Ask(join, wire.Joined, self._timing.backend.join))
            case Stage.JOINING:
                offers = [one.loaded.cache_blocks for one in self.handles if one.loaded is not None]
                self._caches.choose(offers, now)
                self._allocate(now)
            case Stage.ALLOCATING:
                self._on_allocated(cast("Mapping[int, wire.CacheAllocated]", answers), now)
            case Stage.TESTING:
                self._on_tested(self._verification.tested(cast("wire.StepDone", answers[0]).fingerprint), now)
            case Stage.SCRUBBING:
                tensors = [cast("wire.Scrubbed", one).tensors for one in answers.values()]
                self._on_tested(verdict := self._verification.scrubbed(tensors), now)
                if verdict is Verdict.RIGHT:
                    self._do(Log(f"{self._verification.words}; it always is and the weights are right: accepted"))
            case Stage.WARMING:
                self._on_verified(now)
            case _:
                pass

    def _allocate(self, now: float) -> None:
        self._enter(Stage.ALLOCATING, now)
        self._do(AllocateCaches(self.epoch, self._caches.blocks, self._unverified, ALLOCATE))

    def _on_allocated(self, answers: Mapping[int, wire.CacheAllocated], now: float) -> None:
        before = self._caches.blocks
        again = self._caches.retry_at({rank: one.blocks for rank, one in answers.items()}, now)
        if self._caches.blocks < before:
            self._do(Log(f"a rank has no room for {before} blocks of cache: every rank gets {self._caches.blocks}"))
        if again is not None:
            self._due = again
        else:
            self._on_joined(answers, now)

    def _on_joined(self, answers: Mapping[int, wire.CacheAllocated], now: float) -> None:
        self._joined, self._unverified = True, False
        for handle in self.handles:
            handle.joined_epoch = self.epoch
            handle.memory_bytes = answers[handle.rank].memory_bytes
        self._laid_out = tuple(answers[handle.rank].contents for handle in self.handles)
        spoiled = [rank for rank, one in answers.items() if one.spoiled]
        if len(spoiled) == 1:  # all had the same to compute it from
            self._do(AttributeNaN(spoiled[0]))
        self._phases["rebuild"] = now - self._gathered_at
        words = f"a new communicator, and {self._caches.blocks} blocks of cache on each rank"
        self._phase("rebuild", self._phases["rebuild"], words)
        if self._incarnations() != self._processes:
            self._do(ProcessesChanged())
        self._enter(Stage.TESTING, now)
        self._tested_at = now
        self._verification.begin(self._incarnations())
        self._probe()

    def _incarnations(self) -> list[str]:
        return [handle.last_incarnation for handle in self.handles]

    def _probe(self) -> None:
        self._do(RunStep(tuple(probe(self._caches.blocks - PROBE_BLOCKS))))

    def _on_tested(self, verdict: Verdict, now: float) -> None:
        match verdict:
            case Verdict.TEST_AGAIN:
                self._probe()
            case Verdict.SCRUB:
                self._enter(Stage.SCRUBBING, now)
                self._do(Ask(wire.Scrub(epoch=self.epoch), wire.Scrubbed, SCRUB))
            case Verdict.WRONG:
                self._fault(Evidence(Fault.CORRUPTION, None, self._verification.words), now)
            case Verdict.RIGHT if self.has_served:
                self._on_verified(now)
            case Verdict.RIGHT:
                self._enter(Stage.WARMING, now)
                self._do(RunStep(tuple(warmup_step(self._caches.blocks - PROBE_BLOCKS))))

    def _on_verified(self, now: float) -> None:
        self._phases["verify"] = now - self._tested_at
        self._phase("verify", self._phases["verify"], "an all-reduce of ones and the probe gave what they must")
        if self._model_known:
            self._serve(now)
        else:
            self._enter(Stage.WAITING, now, MODEL_SECONDS)

    def _serve(self, now: float) -> None:
        kept, self._contents = self._laid_out == self._contents, self._laid_out
        respawned = self._incarnations() != self._processes
        self._processes = self._incarnations()
        offered = [one.loaded for one in self.handles if one.loaded is not None]
        for handle in self.handles:
            handle.state = RankState.READY
        self._enter(Stage.SERVING, now)
        self.accepting_until = None
        self._do(
            Resume(
                epoch=self.epoch,
                blocks=self._caches.blocks - PROBE_BLOCKS,
                block_size=offered[0].block_size if offered else 1,
                kept=kept,
                phases={name: round(value, 4) for name, value in self._phases.items()},
                respawned=respawned,
                first=not self.has_served,
            )
        )
        self.has_served = True

    def _phase(self, phase: str, seconds: float, words: str) -> None:
        self._do(PhaseOver(phase, seconds, words))
