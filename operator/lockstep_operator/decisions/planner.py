"""What to do about a model (pure): observed and wanted in, actions with reasons out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from lockstep_operator.decisions import (
    commit_pin,
    disruption,
    evacuation,
    manifests,
    pinning,
    rollout,
    surge,
    tokens,
    upkeep,
)
from lockstep_operator.decisions.actions import Action, Apply, Delete
from lockstep_operator.decisions.disruption import Disruption
from lockstep_operator.decisions.evacuation import Evacuation
from lockstep_operator.decisions.group_plan import GroupPlan, GroupPlanner
from lockstep_operator.decisions.guard import Bug, Guard
from lockstep_operator.decisions.name_conflicts import NameConflicts
from lockstep_operator.decisions.pinning import Pinned
from lockstep_operator.decisions.recovery_policy import RecoveryDecision
from lockstep_operator.decisions.restart import with_restart
from lockstep_operator.decisions.rollout import RolloutDecision, RolloutStep
from lockstep_operator.groups.facts import GroupFacts, facts_of
from lockstep_operator.groups.group import Group, excess_groups, groups_of
from lockstep_operator.groups.pod_issues import should_force_delete
from lockstep_operator.groups.waiting import unplaced
from lockstep_operator.settings import Settings
from lockstep_operator.types.model_source import HuggingFace
from lockstep_operator.types.model_status import PinnedModel, Rollback, Runtime, SurgeGroup
from lockstep_operator.types.names import group_token_name
from lockstep_operator.types.observed import ObjectRef, Observed
from lockstep_operator.types.spec import Model

NO_CONFLICTS = NameConflicts()
NO_DISRUPTION = Disruption()
NO_EVACUATION = Evacuation()
NO_RUNTIME = Runtime()
NOTHING: Sequence[Action] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    actions: tuple[Action, ...] = ()
    revision: str = ""  # that the spec asks for; empty while nobody knows
    groups: tuple[GroupFacts, ...] = ()  # that the decision went by
    rollout: tuple[RolloutDecision, ...] = ()
    excess: tuple[Group, ...] = ()
    conflicts: NameConflicts = NO_CONFLICTS
    recoveries: Mapping[int, RecoveryDecision] = field(default_factory=dict)  # by group
    bugs: tuple[Bug, ...] = ()
    surge: tuple[SurgeGroup, ...] = ()  # groups beyond replicas, as the status is to have them
    disruption: Disruption = NO_DISRUPTION
    evacuation: Evacuation = NO_EVACUATION
    pinned: Pinned | None = None  # what pods are made from; None while nobody knows
    runtime: Runtime = NO_RUNTIME
    rollback: Rollback | None = None  # that was asked for, as the status is to have it
    pin: PinnedModel | None = None  # what the hub's model is resolved to, as the status is to have it

    @property
    def requeue_after(self) -> float | None:
        """In how many seconds recovery must decide again."""
        delays = (recovery.requeue_after for recovery in self.recoveries.values())
        return min((delay for delay in delays if delay is not None), default=None)


def decide(model: Model, observed: Observed, now: float, settings: Settings) -> Decision:
    """Recovery first, then lost pods, then all else. `now` is unix seconds."""
    known = _known(model, observed, now, settings)
    model, guard = known.model, known.guard
    groups = [one.group for one in known.facts]
    kept = guard("revisions", known.revisions, NOTHING)
    plans = _plans(known, kept)
    moving = guard(
        "evacuations",
        lambda: evacuation.decide(model, observed, groups, known.conflicts.groups, now),
        NO_EVACUATION,
    )
    budget = guard("evictions", lambda: disruption.decide(model, observed, groups, moving, settings), NO_DISRUPTION)
    surging = guard("surge groups", lambda: _surge(known, moving), observed.status.surge)
    runtime = guard("the runtime", lambda: _runtime(known), observed.status.runtime)
    actions = tuple(_once(_actions(known, plans, kept, (*budget.actions, *moving.moves))))
    paused = model.intervention.paused
    return Decision(
        actions=() if paused else actions,
        revision=known.revision,
        groups=known.facts,
        rollout=known.steps if known.revision else (),
        excess=known.excess,
        conflicts=known.conflicts,
        recoveries={plan.group: plan.recovery for plan in plans if plan.recovery and not paused},
        disruption=budget,
        evacuation=moving,
        bugs=tuple(guard.bugs),
        surge=observed.status.surge if paused else surging,
        pinned=known.pinned,
        runtime=observed.status.runtime if paused else runtime,
        rollback=pinning.rollback(model, observed.status.rollback),
        pin=commit_pin.pin(model, known.revision, known.own, observed.status.model),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """What every part of the decision goes by. `own`: groups whose names are not another model's."""

    model: Model
    observed: Observed
    settings: Settings
    now: float
    guard: Guard
    conflicts: NameConflicts
    facts: tuple[GroupFacts, ...]
    own: tuple[GroupFacts, ...]
    excess: tuple[Group, ...]
    pinned: Pinned | None
    commit: str
    astray: Mapping[int, str]
    held: Mapping[int, str]
    steps: tuple[RolloutDecision, ...]

    @property
    def revision(self) -> str:
        return self.pinned.current.revision if self.pinned else ""

    def revisions(self) -> Sequence[Action]:
        """What is done about the templates that are kept."""
        if self.pinned is None:
            return NOTHING
        everybody = (*(one.group for one in self.facts), *self.excess)
        return [*pinning.upkeep(self.model, self.observed, self.pinned, everybody)]


def _known(model: Model, observed: Observed, now: float, settings: Settings) -> _Known:
    guard, conflicts = Guard(), NameConflicts.of(model, observed)
    facts = tuple(_facts(group, observed, model, now, guard) for group in groups_of(model, observed))
    own = tuple(one for one in facts if one.group.index not in conflicts.groups)
    model = with_restart(model, (one.group for one in own))
    pinned = None if conflicts.whole else guard("the pods' template", lambda: _pinned(model, observed, settings), None)
    revision = pinned.current.revision if pinned else ""
    commit = commit_pin.pinned(model, observed.status.model)
    astray = commit_pin.astray(revision, own, commit)
    held = _held(model, own, pinned) if pinned else {}
    return _Known(
        model=model,
        observed=observed,
        settings=settings,
        now=now,
        guard=guard,
        conflicts=conflicts,
        facts=facts,
        own=own,
        excess=excess_groups(model, observed),
        pinned=pinned,
        commit=commit,
        astray=astray,
        held=held,
        steps=_rollout(model, own, revision, astray, held),
    )


def _plans(known: _Known, kept: Sequence[Action]) -> list[GroupPlan]:
    source = known.model.source
    planner = GroupPlanner(
        model=known.model,
        observed=known.observed,
        revision=known.revision,
        templates=known.pinned.history if known.pinned else {},
        needs=(
            ("Secret", group_token_name(known.model.name, known.model.tokens_id)),
            *(action.target for action in kept if isinstance(action, Apply)),
        ),
        settings=known.settings,
        now=known.now,
        guard=known.guard,
        commit="" if isinstance(source, HuggingFace) and source.is_fixed else known.commit,
    )
    return [planner.plan(one, step) for one, step in zip(known.own, known.steps, strict=True)]


def _actions(
    known: _Known, plans: Sequence[GroupPlan], kept: Sequence[Action], moves: Sequence[Action]
) -> Iterator[Action]:
    """In the order of how pressing they are. `kept` are about templates, `moves` about evictions."""
    model, observed, guard = known.model, known.observed, known.guard
    for plan in plans:
        yield from plan.urgent
    yield from guard("lost pods", lambda: [*_lost_pods(model, observed, known.now)], NOTHING)
    if not known.conflicts.whole:
        yield from guard("what all groups share", lambda: _shared(known), NOTHING)
    yield from kept
    for plan in plans:
        yield from plan.upkeep
    if not known.conflicts.whole:
        yield from moves
        yield from guard("groups beyond replicas", lambda: [*upkeep.scale_down(model, observed, known.excess)], NOTHING)


def _facts(group: Group, observed: Observed, model: Model, now: float, guard: Guard) -> GroupFacts:
    bare = GroupFacts(group=group, last=observed.status.group(group.index))
    return guard(f"group {group.index}", lambda: facts_of(group, observed, model, now), bare)


def _rollout(
    model: Model, own: Sequence[GroupFacts], revision: str, astray: Mapping[int, str], held: Mapping[int, str]
) -> tuple[RolloutDecision, ...]:
    """While nobody knows what pods are to be, those that there are stay, and are healed."""
    groups = [one.group for one in own]
    if not revision:
        return tuple(
            RolloutDecision(one.index, RolloutStep.WAIT, f"group {one.index} stays as it is") for one in groups
        )
    beyond = [one.index for one in groups if one.index >= model.replicas]
    fenced = model.intervention.fenced
    free = [one for one in groups if one.index not in fenced]
    most, without = model.rollout.max_unavailable, _unplaced(own, revision)
    found = rollout.plan(free, revision, most, without, astray, beyond, held)
    left = [RolloutDecision(index, RolloutStep.LEAVE, f"group {index} is fenced") for index in fenced]
    by_group = {one.group: one for one in (*found, *left)}
    return tuple(by_group[one.index] for one in groups)


def _unplaced(own: Sequence[GroupFacts], revision: str) -> set[int]:
    return {one.group.index for one in own if unplaced(one.last.waiting, revision)}


def _surge(known: _Known, moving: Evacuation) -> tuple[SurgeGroup, ...]:
    """Those that there are stay, while nobody knows what pods are to be."""
    model, before, revision = known.model, known.observed.status.surge, known.revision
    if not revision:
        return before
    groups = [one.group for one in known.own]
    left = {*known.held, *_unplaced(known.own, revision), *model.intervention.fenced}
    asked = [one for one in groups if one.index < model.replicas and one.index not in left]
    needs = [surge.of_rollout(model.rollout.max_surge, asked, revision, known.astray), moving.need]
    ready = {one.index for one in groups if one.ready}
    return surge.plan(model.replicas, before, needs, ready, {one.index for one in known.excess})


def _once(actions: Iterable[Action]) -> Iterator[Action]:
    """Of two writes to the same object the first: it has the more pressing reason."""
    seen: set[ObjectRef] = set()
    for action in actions:
        if action.target not in seen:
            seen.add(action.target)
            yield action


def _pinned(model: Model, observed: Observed, settings: Settings) -> Pinned | None:
    """None when the spec asks for what no pod can be."""
    return None if model.flaw else pinning.pin(model, observed, settings)


def _held(model: Model, own: Sequence[GroupFacts], pinned: Pinned) -> dict[int, str]:
    """The revisions of groups below the partition that are to have another than the newest: the one that they have, or
    had; and those that are new get the others'."""
    below = [one for one in own if one.group.index < min(model.rollout.partition, model.replicas)]
    kept = {one.group.index: one.group.revision or one.last.revision for one in below}
    known = [revision for revision in kept.values() if revision in pinned.history]
    older = next((revision for revision in known if revision != pinned.current.revision), pinned.current.revision)
    found = {
        one.group.index: kept[one.group.index] if one.group.exists or kept[one.group.index] in known else older
        for one in below
    }
    return {index: revision for index, revision in found.items() if revision != pinned.current.revision}


def _runtime(known: _Known) -> Runtime:
    if known.pinned is None:
        return known.observed.status.runtime
    groups = [one.group for one in known.own if one.group.index not in known.held]
    return pinning.runtime(known.model, known.pinned, groups, known.observed)


def _shared(known: _Known) -> list[Action]:
    model, observed = known.model, known.observed
    made = tokens.upkeep(model, observed, known.facts, known.now)
    return [*made, *upkeep.repaired(observed, manifests.shared(model))]


def _lost_pods(model: Model, observed: Observed, now: float) -> Iterator[Action]:
    if model.recovery.observe:
        return
    for pod in observed.pods:
        if should_force_delete(pod, now) and pod.group not in model.intervention.fenced:
            reason = f"pod {pod.name} is on node {pod.node}, which doesn't respond: it is force-deleted"
            yield Delete("Pod", pod.name, pod.uid, reason, grace=0)
