"""What to do about a model (pure): observed and wanted in, actions with reasons out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from lockstep_operator.decisions import manifests, recovery_policy, rollout
from lockstep_operator.decisions.drift import differences
from lockstep_operator.decisions.name_conflicts import NameConflicts
from lockstep_operator.decisions.recovery_policy import RecoveryDecision, RecoveryInput
from lockstep_operator.decisions.restart import with_restart
from lockstep_operator.decisions.rollout import RolloutDecision, RolloutStep
from lockstep_operator.groups.group import Group, excess_groups, groups_of, is_ours
from lockstep_operator.groups.group_view import block_of
from lockstep_operator.groups.pod_issues import find_issue, should_force_delete
from lockstep_operator.groups.waiting import recovering_since
from lockstep_operator.groups.waiting import unplaced as unplaced_since_before
from lockstep_operator.settings import Settings
from lockstep_operator.types.names import GROUP_LABEL, group_name, token_name
from lockstep_operator.types.observed import ObjectRef, Observed
from lockstep_operator.types.recovery_state import from_status
from lockstep_operator.types.spec import Model

RECYCLE_GRACE_SECONDS: Final = 5  # a group that can't serve has nothing to finish
_FIXED_IN_STATEFUL_SETS = ("serviceName", "podManagementPolicy", "selector")


@dataclass(frozen=True, slots=True)
class CreateToken:
    """Make the Secret, with a token drawn when it is made; an existing one is left alone."""

    name: str
    reason: str
    needs: tuple[ObjectRef, ...] = ()

    @property
    def target(self) -> ObjectRef:
        return ("Secret", self.name)

    @property
    def wish(self) -> object:
        return "create"


@dataclass(frozen=True, slots=True)
class Apply:
    kind: str
    manifest: Mapping[str, Any] = field(repr=False)
    reason: str
    repairs: str = ""  # what someone changed, when that is why
    uid: str = ""  # of the object as it was seen; empty when there was none
    needs: tuple[ObjectRef, ...] = ()  # writes without which this one must not be

    @property
    def name(self) -> str:
        return str(self.manifest["metadata"]["name"])

    @property
    def target(self) -> ObjectRef:
        return (self.kind, self.name)

    @property
    def wish(self) -> object:
        return self.manifest


@dataclass(frozen=True, slots=True)
class Delete:
    """`grace` in seconds; None leaves it to the object, 0 doesn't wait for anybody."""

    kind: str
    name: str
    uid: str
    reason: str
    grace: int | None = None
    needs: tuple[ObjectRef, ...] = ()

    @property
    def target(self) -> ObjectRef:
        return (self.kind, self.name)

    @property
    def wish(self) -> object:
        return f"delete {self.uid} {self.grace}"


Action = CreateToken | Apply | Delete


@dataclass(frozen=True, slots=True, kw_only=True)
class Bug:
    """A decision that failed by a fault of the operator's own. The others are not held up by it."""

    where: str
    error: Exception

    @property
    def sentence(self) -> str:
        words = str(self.error)[:300] or "no message"
        return f"the operator can't decide about {self.where} ({type(self.error).__name__}: {words}): see its log"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    actions: tuple[Action, ...] = ()
    revision: str = ""  # that the spec asks for; empty while there is no token
    groups: tuple[Group, ...] = ()
    turns: tuple[RolloutDecision, ...] = ()
    excess: tuple[Group, ...] = ()
    conflict: str = ""  # a sentence: something else has a name that the model needs
    conflict_ends: bool = False  # by itself
    token_taken: bool = False  # the Secret of the token's name is another's: nobody is shown what is in it
    verdicts: Mapping[int, RecoveryDecision] = field(default_factory=dict)  # of recovery, by group
    bugs: tuple[Bug, ...] = ()

    @property
    def requeue_after(self) -> float | None:
        """In how many seconds recovery must look once more."""
        return min((v.requeue_after for v in self.verdicts.values() if v.requeue_after is not None), default=None)


def decide(model: Model, observed: Observed, now: float, settings: Settings) -> Decision:
    """Recovery first, then lost pods, then all else. `now` is unix seconds."""
    bugs: list[Bug] = []
    nothing: list[Action] = []
    taken = NameConflicts.of(model, observed)
    groups, excess = groups_of(model, observed), excess_groups(model, observed)
    own = [group for group in groups if group.index not in taken.groups]
    model = with_restart(model, own)
    if taken.whole:
        revision = ""
    else:
        revision = _guarded(lambda: _revision(model, observed, settings), "", "the pods' template", bugs)
    unplaced = {group.index for group in own if unplaced_since_before(block_of(observed.status, group.index), revision)}
    turns = rollout.plan(own, revision, model.max_unavailable, unplaced) if revision else _at_rest(own)
    look = _Context(model, observed, revision, settings, now, bugs)
    plans = [look.plan(group, turn) for group, turn in zip(own, turns, strict=True)]
    urgent = [action for plan in plans for action in plan.urgent]
    lost_pods = _guarded(lambda: [*_lost_pods(model, observed, now)], nothing, "lost pods", bugs)
    shared = [] if taken.whole else _guarded(lambda: _shared(model, observed), nothing, "what all groups share", bugs)
    kept = [action for plan in plans for action in plan.kept]
    removed = _guarded(lambda: [*_scale_down(model, observed, excess)], nothing, "groups beyond replicas", bugs)
    return Decision(
        actions=tuple(_once([*urgent, *lost_pods, *shared, *kept, *([] if taken.whole else removed)])),
        revision=revision,
        groups=groups,
        turns=turns if revision else (),
        excess=excess,
        conflict=taken.sentence,
        conflict_ends=taken.ends,
        token_taken=taken.token,
        verdicts={plan.group: plan.verdict for plan in plans if plan.verdict},
        bugs=tuple(bugs),
    )


T = TypeVar("T")


def _guarded(decision: Callable[[], T], otherwise: T, where: str, bugs: list[Bug]) -> T:
    """One decision that fails must not hold up the others, recovery least of all."""
    try:
        return decision()
    except Exception as error:
        bugs.append(Bug(where=where, error=error))
        return otherwise


def _once(actions: list[Action]) -> Iterator[Action]:
    """Of two writes to the same object the first: it has the more pressing reason."""
    seen: set[ObjectRef] = set()
    for action in actions:
        if action.target not in seen:
            seen.add(action.target)
            yield action


def _revision(model: Model, observed: Observed, settings: Settings) -> str:
    """Empty while there is no token, or when the spec asks for what no pod can be."""
    if observed.token is None or model.flaw:
        return ""
    return manifests.revision(model, observed.token, settings)


def _at_rest(groups: Sequence[Group]) -> tuple[RolloutDecision, ...]:
    """Nobody knows what pods are to be: those that there are stay, and are healed."""
    return tuple(
        RolloutDecision(group.index, RolloutStep.WAIT, f"group {group.index} stays as it is") for group in groups
    )


def _shared(model: Model, observed: Observed) -> list[Action]:
    return [*_token(model, observed), *_repaired(model, observed, manifests.shared(model))]


@dataclass(frozen=True, slots=True, kw_only=True)
class _GroupPlan:
    """What is decided about one group."""

    group: int
    verdict: RecoveryDecision | None
    urgent: tuple[Action, ...]
    kept: tuple[Action, ...]


@dataclass(frozen=True, slots=True)
class _Context:
    """What decisions about all groups go by."""

    model: Model
    observed: Observed
    revision: str  # empty: nobody knows what pods are to be
    settings: Settings
    now: float
    bugs: list[Bug]

    def plan(self, group: Group, turn: RolloutDecision) -> _GroupPlan:
        where = f"group {group.index}"
        verdict = _guarded(lambda: self._recovery(group, turn), None, where, self.bugs)
        kept: list[Action] = []
        if self.revision:
            kept = _guarded(lambda: self._kept(group, turn), kept, where, self.bugs)
        waits = group.deleting or self._template_changes(kept)
        urgent = [] if verdict is None or waits else [*_delete_pods(verdict)]
        return _GroupPlan(group=group.index, verdict=verdict, urgent=tuple(urgent), kept=tuple(kept))

    def _recovery(self, group: Group, turn: RolloutDecision) -> RecoveryDecision | None:
        return recovery_policy.decide(
            self.model.recovery, _situation(self.model, self.observed, group, turn, self.now), self.now
        )

    def _kept(self, group: Group, turn: RolloutDecision) -> list[Action]:
        return [*_group(self.model, self.observed, group, turn, self.revision, self.settings)]

    def _template_changes(self, actions: Collection[Action]) -> bool:
        """Whether pods that went now would come back from a template that is about to change. One that the API server
        doesn't take is not about to."""
        return any(action.target[0] == "StatefulSet" and not self.observed.fails(action.target) for action in actions)


def _situation(model: Model, observed: Observed, group: Group, turn: RolloutDecision, now: float) -> RecoveryInput:
    refused = observed.fails(("StatefulSet", group_name(model.name, group.index)))
    replaced = (turn.step is RolloutStep.REPLACE and not refused) or any(
        pod.revision != group.revision for pod in group.pods
    )
    block = block_of(observed.status, group.index)
    return RecoveryInput(
        seed=f"{model.uid}/{group.index}",
        group=group,
        memory=from_status(block.get("recovery")),
        recovering_since=recovering_since(block),
        report=observed.reports.get(group.index),
        trouble=find_issue(group, observed.warnings, now),
        moving=f"group {group.index} is being replaced by revision {group.revision} anyway" if replaced else "",
    )


def _lost_pods(model: Model, observed: Observed, now: float) -> Iterator[Action]:
    if model.recovery.observe:
        return
    for pod in observed.pods:
        if should_force_delete(pod, now):
            reason = f"pod {pod.name} is lost with its node {pod.node}, which isn't heard from: it is given up"
            yield Delete("Pod", pod.name, pod.uid, reason, grace=0)


def _token(model: Model, observed: Observed) -> Iterator[Action]:
    name = token_name(model.name)
    secret = observed.child("Secret", name)
    if secret is None:
        yield CreateToken(name, f"Secret {name} with the group's token is missing")
    elif observed.token is None and "deletionTimestamp" not in secret["metadata"]:
        yield Delete("Secret", name, secret["metadata"]["uid"], f"Secret {name} has lost its token and is made anew")


def _group(
    model: Model, observed: Observed, group: Group, turn: RolloutDecision, revision: str, settings: Settings
) -> Iterator[Action]:
    beside = [*_repaired(model, observed, manifests.of_group(model, group.index, settings))]
    yield from beside
    if not manifests.has_network_policy(model, settings):
        yield from _unwanted(model, observed, "NetworkPolicy", group.index, "is no longer asked for")
    if group.deleting or turn.step is RolloutStep.WAIT:
        return
    written = from_status(block_of(observed.status, group.index).get("recovery"))
    manifest = manifests.stateful_set(model, group.index, revision, settings, sorted(written.avoided), observed.limits)
    if group.workload and (fixed := _fixed_differences(manifest, group.workload)):
        reason = f"StatefulSet {manifest['metadata']['name']} can't be changed in place ({fixed}) and is made anew"
        yield Delete("StatefulSet", manifest["metadata"]["name"], group.uid, reason)
        return
    if turn.step is RolloutStep.REPLACE:
        yield Apply("StatefulSet", manifest, turn.reason, uid=group.uid)
        return
    # No pod before the wall around it.
    needs = tuple(action.target for action in beside if not group.exists)
    first = [*_repaired(model, observed, [manifest], needs)]
    yield from first
    if group.settled and all(observed.fails(action.target) for action in first):
        yield from _outdated(group, revision)


def _delete_pods(verdict: RecoveryDecision) -> Iterator[Action]:
    for pod in verdict.targets:
        yield Delete("Pod", pod.name, pod.uid, verdict.reason, grace=RECYCLE_GRACE_SECONDS)


def _outdated(group: Group, revision: str) -> Iterator[Action]:
    for pod in group.pods:
        if pod.revision != revision and pod.deleting is None:
            yield Delete("Pod", pod.name, pod.uid, f"pod {pod.name} has revision {pod.revision} instead of {revision}")


def _fixed_differences(manifest: Mapping[str, Any], live: Mapping[str, Any]) -> str:
    wanted = {name: manifest["spec"][name] for name in _FIXED_IN_STATEFUL_SETS}
    return ", ".join(sorted(differences(wanted, live.get("spec") or {})))


def _repaired(
    model: Model, observed: Observed, manifests: list[manifests.Manifest], needs: tuple[ObjectRef, ...] = ()
) -> Iterator[Apply]:
    for manifest in manifests:
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        live = observed.child(kind, name)
        if live is None:
            yield Apply(kind, manifest, f"{kind} {name} is missing", _loss(model, observed, manifest), needs=needs)
        elif "deletionTimestamp" not in live["metadata"] and (found := differences(manifest, live)):
            if found == observed.server_mutations.get((kind, name)):
                continue
            listed = ", ".join(sorted(found))
            ours = any(
                "metadata.annotations" in difference for difference in found
            )  # we want something else than before
            uid = str(live["metadata"]["uid"])
            yield Apply(kind, manifest, f"{kind} {name} differs: {listed}", "" if ours else listed, uid=uid)


def _loss(model: Model, observed: Observed, manifest: manifests.Manifest) -> str:
    """Whether what is missing was there before: the status says so."""
    label = manifest["metadata"]["labels"].get(GROUP_LABEL)
    known = [
        str(group["group"])
        for group in observed.status.get("groups") or []
        if group.get("revision") or group.get("leaderUID")
    ]
    was_there = bool(observed.status.get("revision")) if label is None else label in known
    return "it was missing" if was_there else ""


def _scale_down(model: Model, observed: Observed, excess: tuple[Group, ...]) -> Iterator[Action]:
    """Groups that are no longer asked for: first the pods, which finish their requests, then the rest."""
    for group in excess:
        name = group_name(model.name, group.index)
        if group.workload is not None:
            if not group.deleting:
                yield Delete("StatefulSet", name, group.uid, f"group {group.index} is beyond replicas {model.replicas}")
            continue
        if observed.pods_of(group.index):
            continue
        for kind in ("Service", "NetworkPolicy"):
            yield from _unwanted(model, observed, kind, group.index, "of the removed group is left over")


def _unwanted(model: Model, observed: Observed, kind: str, group: int, why: str) -> Iterator[Action]:
    name = group_name(model.name, group)
    child = observed.child(kind, name)
    if child is not None and is_ours(model, child) and "deletionTimestamp" not in child["metadata"]:
        yield Delete(kind, name, child["metadata"]["uid"], f"{kind} {name} {why}")
