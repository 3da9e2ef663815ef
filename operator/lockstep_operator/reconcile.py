"""One pass over one model: observe, decide, apply, report. Nothing is remembered that can't be found again.

A pass begins with the indexes. When they leave nothing to do, the model is at rest, and no request was made. What they
lack is made, and what is seen is reported. For all else it begins again with the API server's answers: only such a pass
changes or deletes anything, or decides what the next one acts on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

import msgspec

from lockstep_operator.cluster.client import Kube, KubeError
from lockstep_operator.cluster.executor import Applied, StaleError, due, execute, makes
from lockstep_operator.cluster.failures import Failures
from lockstep_operator.cluster.indexes import Indexes, key_of
from lockstep_operator.cluster.namespace_limits import NamespaceLimits
from lockstep_operator.cluster.observe import Indexed, LastLook, Live, Source, last_look, resource_of
from lockstep_operator.cluster.obstacles import find_obstacle
from lockstep_operator.cluster.served_schema import ServedSchema
from lockstep_operator.cluster.status_writer import StatusWriter
from lockstep_operator.cluster.turns import Turns
from lockstep_operator.decisions import node_suspicion
from lockstep_operator.decisions.actions import MakeTokens
from lockstep_operator.decisions.planner import Decision, decide
from lockstep_operator.groups.group import groups_of
from lockstep_operator.groups.pod_issues import needs_events
from lockstep_operator.groups.status_poller import PollTarget as Leader
from lockstep_operator.live.board import Board
from lockstep_operator.reporting import document, events
from lockstep_operator.reporting.conditions import Obstacle
from lockstep_operator.reporting.metrics import Metrics
from lockstep_operator.reporting.recovery_log import Repair
from lockstep_operator.reporting.significance import worth_writing
from lockstep_operator.reporting.transition import Transition, transition
from lockstep_operator.settings import Settings
from lockstep_operator.types import spec
from lockstep_operator.types.model_status import ModelStatus, NodeFaults, Tokens, parse
from lockstep_operator.types.names import KIND, ModelKey
from lockstep_operator.types.observed import GroupReport, Object, ObjectRef, Observed, wanted_groups
from lockstep_operator.types.operator_key import OperatorKey
from lockstep_operator.types.reasons import ConditionType, Reason
from lockstep_operator.types.recovery_state import RecoveryState
from lockstep_operator.types.spec_values import SpecError

log = logging.getLogger(__name__)

NO_STEPS: Final = RecoveryState()
UNSETTLED_SECONDS: Final = 10.0  # a model that isn't Ready is reconciled again, for what sends no event


class Groups(Protocol):
    """How groups are polled; see `status_poller`."""

    def watch(self, key: ModelKey, targets: Mapping[int, Leader]) -> None: ...

    def reports(self, key: ModelKey, leaders: Mapping[int, str]) -> dict[int, GroupReport]: ...


@dataclass(frozen=True, slots=True)
class ReconcileOutcome:
    """`requeue_after` is in how many seconds to reconcile again at the latest; None when the model is gone."""

    requeue_after: float | None
    wrote: bool = False
    failing: bool = False  # something keeps the operator from doing what the spec asks


@dataclass(slots=True)
class _Known:
    """What is remembered of a model: it saves writes, and keeps track of what fails. No decision rests on it alone."""

    failures: Failures
    last: LastLook
    server_mutations: dict[ObjectRef, frozenset[str]] = field(default_factory=dict)
    tokens: Tokens | None = None  # as they were made last: an older CRD has no room for that
    unwritten: Mapping[str, Any] | None = None  # a status that the API server rejects in every form: recovery uses it


Tell = Callable[[ModelKey, Sequence[Repair]], None]


def unheard(key: ModelKey, repairs: Sequence[Repair]) -> None:
    """Nobody wants to know of repairs."""


class Reconciler:
    """Safe to run for several models at once, but not twice at the same time for one."""

    def __init__(
        self,
        kube: Kube,
        groups: Groups,
        settings: Settings,
        metrics: Metrics,
        now: Callable[[], float],
        operator_key: OperatorKey,
        schema: ServedSchema | None = None,
        indexes: Indexes | None = None,
        board: Board | None = None,
        tell: Tell = unheard,
    ) -> None:
        """`tell` is told of every repair, once."""
        self._kube = kube
        self._groups = groups
        self._settings = settings
        self._metrics = metrics
        self._now = now
        self._operator_key = operator_key
        self._schema = schema or ServedSchema()
        self._writer = StatusWriter(kube, self._schema, metrics)
        self._indexes = indexes or Indexes()
        self._board = board or Board()
        self._tell = tell
        self._limits = NamespaceLimits(kube, now)
        self._turns = Turns(settings.update_concurrency, self._indexes)
        self._known: dict[ModelKey, _Known] = {}
        self._blamed: dict[ModelKey, tuple[NodeFaults, ...]] = {}  # as the models' status has it
        self._looked_at: set[ModelKey] = set()

    async def reconcile(self, key: ModelKey) -> ReconcileOutcome:
        """One pass, at the end of which the status is written whatever failed in it. Raises KubeError when the API
        server can't be reached now."""
        now = self._now()
        known = self._known.setdefault(key, _Known(Failures(self._now), LastLook(now)))
        for source in self._sources(key, known, now):
            try:
                outcome = await self._pass(key, source, known)
            except KubeError as error:
                if source.live or error.status != 409:
                    raise
                log.info("%s: %s; it is looked at anew", key, error)
            except StaleError:
                log.info("%s: there is more than was heard of; it is looked at anew", key)
            else:
                if outcome is not None:
                    if key in self._known:
                        self._looked_at.add(key)
                    return outcome
        raise RuntimeError("a live pass does what there is to do")

    def _sources(self, key: ModelKey, known: _Known, now: float) -> Iterator[Source]:
        """The indexes first, unless they may lag behind or nothing else was asked for long."""
        resource = resource_of(key, self._indexes, known.last)
        if resource is not None:
            ready = _readable(resource.get("status") or {}).is_true(ConditionType.READY)
            if known.last.serves(key, ready=ready, now=now):
                yield Indexed(self._limits, self._indexes, known.last, ready)
        yield Live(self._kube, self._limits)

    async def _pass(self, key: ModelKey, source: Source, known: _Known) -> ReconcileOutcome | None:
        """None: there is something to do, and this source is not good enough for it."""
        resource = await source.resource(key)
        if resource is None or "deletionTimestamp" in resource["metadata"]:
            return self._ended(key) if source.live else None
        try:
            return await self._look(spec.parse(resource, self._settings.sources), resource, source, known)
        except SpecError as error:
            return await self._halt(key, resource, source, Reason.INVALID_SPEC, str(error))
        except KubeError as error:
            if error.transient:
                raise
            text = f"the API server refuses what the operator must read or write: {error}"
            return await self._halt(key, resource, source, Reason.REFUSED, text)
        except StaleError:
            raise
        except Exception as error:  # a bug: it is reported where people look, and stops no other model
            log.exception("%s: reconciling failed", key)
            text = f"the operator can't work on this model ({type(error).__name__}: {str(error)[:300]}): see its log"
            return await self._halt(key, resource, source, Reason.OPERATOR_ERROR, text)

    async def _look(
        self, model: spec.Model, resource: Object, source: Source, known: _Known
    ) -> ReconcileOutcome | None:
        observed = await self._observe(model, resource, source, known)
        decision = decide(model, observed, self._now(), self._settings)
        to_do = due(decision.actions, known.failures)
        change, obstacle = self._change(model, observed, decision, known, Applied())
        if not source.live and (plans(change) or not all(map(makes, to_do))):
            return None
        for bug in decision.bugs:
            log.error("%s: deciding about %s failed", model.key, bug.where, exc_info=bug.error)
        known.last.dirty = True  # until the pass has come to its end
        applied = await execute(
            self._kube,
            model,
            decision.actions,
            self._operator_key,
            known.failures,
            self._metrics,
            live=source.live,
        )
        if applied.ending:
            return ReconcileOutcome(requeue_after=self._settings.resync_seconds)
        known.server_mutations.update(applied.server_mutations)
        known.last.wrote(applied.written, self._now())
        if to_do:
            change, obstacle = self._change(model, observed, decision, known, applied)
        if not decision.runtime.updating:
            self._turns.give_back(model.key)
        self._groups.watch(model.key, targets(model, decision, self._operator_key))
        return await self._report(resource, observed, decision, applied, change, obstacle, known)

    def _change(
        self, model: spec.Model, observed: Observed, decision: Decision, known: _Known, applied: Applied
    ) -> tuple[Transition, Obstacle | None]:
        """What the pass comes to, and what keeps the operator from doing what the spec asks."""
        now = self._now()
        obstacle = find_obstacle(model, decision, known.failures, observed.status, now)
        return transition(model, decision, observed.status, obstacle, applied.effective, now), obstacle

    def _ended(self, key: ModelKey) -> ReconcileOutcome:
        self.forget(key)
        return ReconcileOutcome(requeue_after=None)

    def doubt(self, key: ModelKey) -> None:
        """Let the next pass read everything live."""
        if known := self._known.get(key):
            known.last.dirty = True

    def forget(self, key: ModelKey) -> None:
        self._turns.give_back(key)
        self._groups.watch(key, {})
        self._metrics.forget(key)
        self._board.forget(key)
        self._known.pop(key, None)
        self._blamed.pop(key, None)
        self._looked_at.discard(key)

    def knows_all(self) -> bool:
        """Whether there has been a pass for every model."""
        return all(key in self._looked_at for key in self._indexes.models())

    def suspicion(self) -> dict[str, int]:
        """Faults that all models hold against nodes just now, by node."""
        return node_suspicion.shared(self._blamed.values(), self._now())

    def _hold_against_nodes(self, key: ModelKey, status: ModelStatus) -> None:
        if status.node_faults:
            self._blamed[key] = status.node_faults
        else:
            self._blamed.pop(key, None)

    def forget_others(self, serves: Callable[[str], bool]) -> None:
        """Of models in namespaces that are no longer served."""
        for key in [key for key in self._known if not serves(key.namespace)]:
            self.forget(key)

    async def _observe(self, model: spec.Model, resource: Object, source: Source, known: _Known) -> Observed:
        now, indexed = self._now(), self._indexes.versions(model.key)
        status = parse(_last_document(resource, known))
        status = msgspec.structs.replace(status, tokens=status.tokens or known.tokens)
        groups = wanted_groups(model, status)
        children, pods, limits = await asyncio.gather(
            source.children(model, groups), source.pods(model), source.limits(model.namespace)
        )
        if source.live:
            known.last = last_look(model, groups, resource, children, pods, indexed, now)
        observed = Observed(
            status=status,
            resource_version=resource["metadata"].get("resourceVersion", ""),
            children=children,
            pods=pods,
            server_mutations=known.server_mutations,
            failing=frozenset(known.failures.of),
            limits=limits,
            leaving_nodes=self._indexes.leaving_nodes,
            suspicion=self.suspicion(),
            operator_key=self._operator_key.id,
            may_update=model.auto_update and status.runtime.outdated and self._turns.take(model.key),
        )
        seen = groups_of(model, observed)
        leaders = {group.index: group.leader.uid for group in seen if group.leader}
        warnings = await known.last.explained(self._kube, model.namespace, needs_events(seen, now), now)
        return replace(observed, warnings=warnings, reports=self._groups.reports(model.key, leaders))

    async def _report(
        self,
        resource: Object,
        observed: Observed,
        decision: Decision,
        applied: Applied,
        change: Transition,
        obstacle: Obstacle | None,
        known: _Known,
    ) -> ReconcileOutcome:
        now, failures, key = self._now(), known.failures, key_of(KIND, resource["metadata"])
        built = self._schema.fitting(document.document(change.after))
        drafts = [draft for draft in events.event_drafts(change) if not (draft.node and self._settings.namespaces)]
        news = known.unwritten is not None or worth_writing(_last_document(resource, known), built)
        await self._writer.record(resource, drafts, now)
        if news:
            written = await self._writer.write(resource, built)
            known.unwritten = None if written else built
            if written:
                known.last.wrote_status(resource, written, now)
        known.tokens = change.after.tokens
        secrets = sum(isinstance(action, MakeTokens) for action in applied.done)  # nobody looks at them
        known.last.dirty = len(applied.written) + secrets < len(applied.done)
        failing = obstacle is not None or known.unwritten is not None
        self._render(key, change, observed)
        if applied.done:
            return ReconcileOutcome(requeue_after=0.0, wrote=True, failing=failing)
        ready = change.after.is_true(ConditionType.READY)
        settled = self._settings.resync_seconds if ready else min(UNSETTLED_SECONDS, self._settings.resync_seconds)
        requeue_after = min(
            seconds for seconds in (settled, failures.due, decision.requeue_after) if seconds is not None
        )
        # What is written now, the next pass acts on: a step of recovery, the commit that all groups load, what follows.
        before, after = change.before, change.after
        remembered = news and (after.model, after.surge, after.runtime) != (before.model, before.surge, before.runtime)
        planned = remembered or decision.requeue_after == 0.0
        return ReconcileOutcome(requeue_after=0.0 if planned else requeue_after, wrote=planned, failing=failing)

    def _render(self, key: ModelKey, change: Transition, observed: Observed) -> None:
        """What was written, for those who look elsewhere."""
        self._hold_against_nodes(key, change.after)
        self._metrics.node_faults(change.node_faults)
        self._metrics.model(key, change.after)
        self._board.model(key, change.after, observed.reports)
        self._metrics.repaired(key, change.repairs)
        self._tell(key, change.repairs)
        self._metrics.stepped(key, observed.reports)

    async def _halt(
        self, key: ModelKey, resource: Object, source: Source, reason: Reason, message: str
    ) -> ReconcileOutcome | None:
        """The status stays as it is, except for conditions that say why nothing is done."""
        old, now = resource.get("status") or {}, self._now()
        before = _readable(old)
        built = document.halted(old, before, resource["metadata"].get("generation", 1), reason, message, now)
        after = _readable(built)
        if worth_writing(old, built):
            if not source.live:
                return None
            await self._writer.record(resource, events.condition_changes(before, after), now)
            await self._writer.write(resource, self._schema.fitting(built))
        self._metrics.model(key, after)
        self._board.model(key, after)
        return ReconcileOutcome(requeue_after=self._settings.resync_seconds, failing=True)


def plans(change: Transition) -> bool:
    """Whether the status is to hold what a later pass acts on, or what a budget is counted by. A first pin of what pods
    are made from is none: there are no pods yet."""
    before, after = change.before, change.after
    pinned = bool(before.revision) and (before.model, before.runtime) != (after.model, after.runtime)
    return pinned or before.surge != after.surge or _steps(before) != _steps(after)


def _steps(status: ModelStatus) -> dict[int, RecoveryState]:
    return {one.group: one.recovery for one in status.groups if one.recovery != NO_STEPS}


def targets(model: spec.Model, decision: Decision, key: OperatorKey) -> dict[int, Leader]:
    """Whom to poll: the leader pod of every group that has an address."""
    return {
        facts.group.index: Leader(
            leader.uid,
            leader.ip,
            key.operator_token(model.uid, leader.tokens_id) if leader.tokens_id else "",
            leader.status_port,
            fenced=facts.group.index in model.intervention.fenced,
        )
        for facts in decision.groups
        if (leader := facts.group.leader) and leader.ip and leader.deleting is None
    }


def _last_document(resource: Object, known: _Known) -> Mapping[str, Any]:
    """The status as last written, or as it would be if the API server took it."""
    return known.unwritten or resource.get("status") or {}


def _readable(status: Mapping[str, Any]) -> ModelStatus:
    """An empty one, where an older or newer version has written what this one can't read."""
    try:
        return parse(status)
    except (ValueError, msgspec.ValidationError):
        return ModelStatus()
