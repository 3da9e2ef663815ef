"""The group's life. Pure: events and `now` in, actions out; nothing here waits, sends or reads a clock.

Where a life stands, for how long it may, and what follows: see `stage`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lockstep_runtime.config import ServeConfig
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.status import Fault, RankState
from lockstep_runtime.recovery import actions, events
from lockstep_runtime.recovery.actions import Action
from lockstep_runtime.recovery.assembly import Assembly, Step
from lockstep_runtime.recovery.bounded import bounded
from lockstep_runtime.recovery.diagnosis import Evidence
from lockstep_runtime.recovery.events import Answer, Event
from lockstep_runtime.recovery.gathering import Gathering
from lockstep_runtime.recovery.log_trail import TrailPhase
from lockstep_runtime.recovery.membership import Membership
from lockstep_runtime.recovery.policy import RecoveryPolicy, invalidates_caches, requires_cache_check
from lockstep_runtime.recovery.rank_handle import RankHandle
from lockstep_runtime.recovery.stage import APART, Stage
from lockstep_runtime.recovery.timing import ACCEPTING_SECONDS, MODEL_SECONDS, Timing


class Coordinator:
    """Of one group. `epoch` rises with every attempt to form it, and above whatever its ranks have seen before."""

    def __init__(self, config: ServeConfig, timing: Timing, first_epoch: int) -> None:
        self._members = Membership(config)
        self.handles = self._members.handles
        self.policy = RecoveryPolicy(config.tensor_parallel_size, config.recovery_strategy)
        self.epoch = first_epoch
        self.stage = Stage.PAUSING
        self.since = 0.0  # when the stage began
        self.has_served = False
        self.accepting_until: float | None = None  # requests are, while it recovers
        self.poison = ""  # why the group can't heal itself
        self.model = config.model
        self._timing = timing
        self._tries_again = config.recovery_strategy == "Ladder"
        self._due: float | None = None  # of the stage, where the ranks have none of their own
        self._actions: list[Action] = []
        self._assembly = Assembly(self.handles, timing)
        self._failures = 0  # attempts in a row after which no step was done
        self._failing_since: float | None = None  # when the first of them failed
        self._poisonings = 0  # the same
        self._longest_load = 0.0  # seconds
        self._model_known = False
        # of the attempt
        self._under_way = 0.0  # seconds that a rank may compute on though it was aborted
        self._suspects: frozenset[int] = frozenset()
        self._gathering: Gathering
        self._aborted_at: float | None = None
        self._phases: dict[str, float] = {}
        # what the caches are
        self._cache_ids: tuple[str, ...] = ()  # by rank, in which the sequences stand
        self._processes: list[str] = []  # incarnations with which it served last

    @property
    def is_apart(self) -> bool:
        """Whether ranks may come and go without being missed."""
        return self.stage in APART

    def admit(self, hello: bus.Hello) -> bus.Welcome | bus.Refused:
        """Whether this peer belongs here."""
        answer = self._members.admit(hello, self.epoch)
        if isinstance(answer, bus.Welcome):
            self.epoch = answer.epoch
        return answer

    # --- events in, actions out

    def start(self, now: float) -> list[Action]:
        """Form the group for the first time."""
        self._enter(Stage.PAUSING, now, 0.0)
        return self.tick(now)

    def handle(self, event: Event, now: float) -> list[Action]:
        """What an event leads to."""
        match event:
            case events.RankConnected():
                self._on_connected(event, now)
            case events.RankDisconnected():
                self._miss(self.handles[event.rank], "lost its connection", now)
            case events.RankReported():
                if line := self._members.reported(self.handles[event.rank], event.report, now):
                    self._do(line)
            case events.RankExited():
                self._on_exit(event, now)
            case events.RankStopped():
                self._on_stopped(event, now)
            case events.PodConnected():
                if self._members.pod_connected(event) and self.stage is Stage.POISONED:
                    self._try_again(now)
            case events.PodDisconnected():
                self._members.pod_disconnected(event.pod_index)
            case events.PodReleased():
                self._members.pod_released(event.pod_index)
            case events.CallDone():
                self._on_done(event.answers, now)
            case events.GroupFault():
                self._on_fault(event, now)
            case events.ModelRead():  # pragma: no branch - there is no other
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
            self._do(actions.StatusChanged())
        due, self._actions = self._actions, []
        return due

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
            case Stage.ASSEMBLING:
                self._actions += self._assembly.allocate()
            case Stage.POISONED:
                self._renew(now)
            case _:  # WAITING: from now on the state says so
                self._do(actions.StatusChanged())

    # --- ranks and pods come and go

    def _on_connected(self, event: events.RankConnected, now: float) -> None:
        handle = self.handles[event.hello.rank]
        if handle.hello is not None:
            self._miss(handle, "another process has taken its place", now)
        handle.arrive(event.hello, self.epoch, now)

    def _miss(self, handle: RankHandle, how: str, now: float) -> None:
        if handle.is_released:
            how = "has gone with its pod, which was asked to end"
        text = self._members.left(handle, how, now)
        self._do(actions.Log(text, rank=handle.rank))
        if not self.is_apart:
            self._accuse(Evidence(Fault.RANK_LOST, handle.rank, text, planned=handle.is_released), now)

    def _accuse(self, evidence: Evidence, now: float) -> None:
        if self.stage is Stage.WAITING:  # for nothing that could fail
            self._fault(evidence, now)
        else:
            self._do(actions.Accuse(evidence))

    def _on_exit(self, event: events.RankExited, now: float) -> None:
        handle = self.handles[event.rank]
        if not (gone := self._members.exited(event, self.epoch)):
            return
        if gone.loss:
            self._do(actions.RefineFault(gone.loss, gone.message))
        if gone.was_connected:
            self._miss(handle, event.how, now)
            self._do(actions.CloseConnection(handle.rank))
        if gone.early:
            self._on_early_exit(handle, gone.message, now)

    def _on_early_exit(self, handle: RankHandle, message: str, now: float) -> None:
        """A process ended before it was loaded. A first load that reports its error may fail any number of times."""
        if self.stage not in (Stage.PAUSING, Stage.GATHERING):
            return
        if not self.has_served and handle.state is RankState.FAILED:
            return
        message = f"{message} before it was loaded"
        self._do(actions.Log(message, phase=TrailPhase.RESPAWN, rank=handle.rank))
        self._charge(handle, message, now)

    def _on_stopped(self, event: events.RankStopped, now: float) -> None:
        """It answers nothing until someone lets it go on, which nobody may ever do."""
        if not (message := self._members.stopped(event)):
            return
        if self.is_apart:
            self._kill_unresponsive(self.handles[event.rank], message, now, event.incarnation)
        else:
            rank = event.rank
            self._accuse(Evidence(Fault.HANG, rank, message, stragglers=(rank,), outside=True), now)

    # --- a fault, and what is decided about it

    def _on_fault(self, fault: events.GroupFault, now: float) -> None:
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

    def _depart(self, cause: Evidence, now: float) -> None:
        """A pod has left that was let go: nothing is recorded, charged or killed, and its successor is waited for."""
        self._suspects = frozenset()
        self._do(actions.ReportDeparture(cause.message, self.epoch))
        self._enter(Stage.PAUSING, now, 0.0)

    def _fault(self, cause: Evidence, now: float) -> None:
        """One that no call has failed with."""
        self._failures += 1
        self._decide(events.GroupFault(cause, (cause,)), now, reload=True)

    def _decide(self, fault: events.GroupFault, now: float, *, reload: bool) -> None:
        if fault.cause.planned:
            self._depart(fault.cause, now)
            return
        if invalidates_caches(fault.evidence):
            self._cache_ids = ()
        self._assembly.unverified |= requires_cache_check(fault.evidence)
        if self._is_in_vain(now):
            fault = replace(fault, cause=replace(fault.cause, final=True))
        decision = self.policy.decide(fault.cause, fault.evidence, by_request=fault.by_request)
        recorded = self.has_served or decision.rung is None
        named = () if fault.cause.rank is None else (fault.cause.rank,)
        self._suspects = frozenset({*fault.cause.stragglers, *named})
        self._do(actions.ReportFault(fault.cause, fault.evidence, decision, self.epoch, recorded))
        for rank in decision.kill:
            self._kill(self.handles[rank], decision.reason, now, reload=reload)
        if decision.rung is None:
            self._enter_poisoned(decision.reason, now)
        else:
            self._enter(Stage.PAUSING, now, self._timing.retry(self._failures))

    def _is_in_vain(self, now: float) -> bool:
        """Whether one attempt after the other has failed, whatever was done about it, for too long."""
        if self.stage in (Stage.SERVING, Stage.GATHERING):
            self._failing_since = None
            return False
        self._failing_since = now if self._failing_since is None else self._failing_since
        return now - self._failing_since > self._timing.backend.attempts

    def _charge(self, handle: RankHandle, how: str, now: float) -> None:
        """A process was lost, or had to be killed, on the way: when that was once too often, the group gives up."""
        if not self.policy.charge_respawn():
            self._fault(Evidence(Fault.RANK_LOST, handle.rank, f"{how}, again and again", final=True), now)

    def _kill(self, handle: RankHandle, reason: str, now: float, incarnation: str = "", *, reload: bool = True) -> bool:
        """Returns whether its supervisor is connected."""
        kill = self._members.kill(handle, reason, now, incarnation, reload=reload)
        if kill is not None:
            self._do(kill)
        return kill is not None

    def _kill_unresponsive(self, handle: RankHandle, how: str, now: float, incarnation: str = "") -> None:
        """Kill a process that keeps the group from being formed."""
        if self._kill(handle, how, now, incarnation, reload=False):
            self._do(actions.NameCulprit(handle.rank, f"{how} and was killed"))
            if self.stage is not Stage.POISONED:
                self._charge(handle, how, now)

    # --- poisoned

    def _enter_poisoned(self, reason: str, now: float) -> None:
        """Abort every collective, report Poisoned, and wait for a new pod or, with the ladder, for the next attempt."""
        self._poisonings += 1
        seconds = self._timing.poisoned(self._poisonings) if self._tries_again else None
        self._enter(Stage.POISONED, now, seconds)
        self.poison = bounded(reason)
        self._begin_epoch()
        self._actions += self._members.send_aborts(self.epoch, now)
        self._do(actions.DeclarePoisoned(self.poison))

    def _renew(self, now: float) -> None:
        """Time is up: try again, with new processes. A first download goes on."""
        seconds = now - self.since
        for handle in self.handles:
            due = handle.stall_due(self._timing.loading(0.0, has_served=False))
            if self.has_served or due is None or due <= now:
                self._kill(handle, f"the group was poisoned for {seconds:g} s and tries again", now)
        self._try_again(now)

    def _try_again(self, now: float) -> None:
        self.poison, self._failing_since = "", None
        self._assembly.forget_room()
        for handle in self.handles:
            handle.load_failure = None
        self._enter(Stage.PAUSING, now, 0.0)

    # --- gathering

    def _begin_epoch(self) -> None:
        self.epoch += 1
        self._do(actions.BeginEpoch(self.epoch))

    def _gather(self, now: float) -> None:
        self._enter(Stage.GATHERING, now)
        self._begin_epoch()
        backend = self._timing.backend
        self._gathering = Gathering(
            handles=self.handles,
            timing=self._timing,
            since=now,
            has_served=self.has_served,
            abort_seconds=max(backend.abort, self._under_way) if self._assembly.has_joined else backend.abort_joining,
            suspects=self._suspects,
            longest_load=self._longest_load,
            can_kill=self._members.can_kill,
        )
        self._aborted_at = None
        for handle in self.handles:
            handle.begin_forming(now)

    def _gather_on(self, now: float) -> None:
        """Level-triggered: send Abort to ranks that have not got this epoch's, kill those that are late."""
        self._actions += self._members.send_aborts(self.epoch, now)
        if self._aborted_at is None and all(handle.abort_sent_at is None for handle in self.handles):
            self._aborted_at = now
            self._do(
                actions.PhaseOver(TrailPhase.ABORT, now - self.since, "the surviving ranks have left their collectives")
            )
        if all(handle.idle_epoch >= self.epoch for handle in self.handles):
            self._assemble(now)
            return
        for handle, how in self._gathering.late(now):
            self._kill_unresponsive(handle, how, now)
            if self.stage is not Stage.GATHERING:
                return
        if final := self._gathering.hopeless(now):
            self._fault(final, now)

    # --- from loaded ranks to a group that serves

    def _assemble(self, now: float) -> None:
        aborted = now if self._aborted_at is None else self._aborted_at
        self._phases = {"abort": aborted - self.since, "respawn": now - aborted}
        loads = [one.loaded.seconds for one in self.handles if one.loaded is not None]
        self._longest_load = max([self._longest_load, *loads])
        text = f"all {len(self.handles)} ranks have their weights"
        self._do(actions.PhaseOver(TrailPhase.RESPAWN, now - aborted, text))
        self._enter(Stage.ASSEMBLING, now)
        self._actions += self._assembly.begin(self.epoch, now, processes=self._processes, is_first=not self.has_served)

    def _on_done(self, answers: Mapping[int, Answer], now: float) -> None:
        if self.stage is not Stage.ASSEMBLING:
            return
        if gone := next((one for one in self.handles if one.hello is None), None):  # since it answered
            self._fault(Evidence(Fault.RANK_LOST, gone.rank, gone.message, planned=gone.is_released), now)
            return
        self._actions += self._assembly.answered(answers, now)
        self._due = self._assembly.retry_at
        if self._assembly.step is Step.WRONG:
            self._fault(Evidence(Fault.CORRUPTION, None, self._assembly.wrong), now)
        elif self._assembly.step is Step.DONE and self._model_known:
            self._serve(now)
        elif self._assembly.step is Step.DONE:
            self._enter(Stage.WAITING, now, MODEL_SECONDS)

    def _serve(self, now: float) -> None:
        kept, self._cache_ids = self._assembly.cache_ids == self._cache_ids, self._assembly.cache_ids
        respawned = self._members.incarnations != self._processes
        self._processes = self._members.incarnations
        offered = [one.loaded for one in self.handles if one.loaded is not None]
        for handle in self.handles:
            handle.state = RankState.READY
        phases = {**self._phases, **self._assembly.phases}
        self._enter(Stage.SERVING, now)
        self.accepting_until = None
        self._do(
            actions.Resume(
                epoch=self.epoch,
                blocks=self._assembly.blocks,
                block_size=offered[0].block_size if offered else 1,
                state_slots=self._assembly.state_slots,
                kept=kept,
                phases={name: round(value, 4) for name, value in phases.items()},
                respawned=respawned,
                first=not self.has_served,
            )
        )
        self.has_served = True
