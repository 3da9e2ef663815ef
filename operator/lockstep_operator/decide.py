"""What to do about a model (pure): observed and wanted in, actions with reasons out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from lockstep_operator import desired, rollout
from lockstep_operator.drift import differences
from lockstep_operator.groups import Group, excess_groups, groups_of, is_ours
from lockstep_operator.memory import from_status
from lockstep_operator.names import GROUP_LABEL, KIND, group_name, token_name
from lockstep_operator.observe import Observed, controller, expected_names
from lockstep_operator.recovery import Situation, Verdict, recover
from lockstep_operator.rollout import Step, Turn
from lockstep_operator.settings import Settings
from lockstep_operator.spec import Model
from lockstep_operator.troubles import lost, trouble
from lockstep_operator.voices import block_of

RECYCLE_GRACE_SECONDS: Final = 5  # a group that can't serve has nothing to finish
_FIXED_IN_STATEFUL_SETS = ("serviceName", "podManagementPolicy", "selector")


@dataclass(frozen=True, slots=True)
class CreateToken:
    """Make the Secret, with a token drawn when it is made; an existing one is left alone."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Apply:
    kind: str
    manifest: Mapping[str, Any] = field(repr=False)
    reason: str
    repairs: str = ""  # what someone changed, when that is why

    @property
    def name(self) -> str:
        return str(self.manifest["metadata"]["name"])


@dataclass(frozen=True, slots=True)
class Delete:
    """`grace` in seconds; None leaves it to the object, 0 doesn't wait for anybody."""

    kind: str
    name: str
    uid: str
    reason: str
    grace: int | None = None


Action = CreateToken | Apply | Delete


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    actions: tuple[Action, ...] = ()
    revision: str = ""  # that the spec asks for; empty while there is no token
    groups: tuple[Group, ...] = ()
    turns: tuple[Turn, ...] = ()
    excess: tuple[Group, ...] = ()
    conflict: str = ""  # a sentence: something else has a name that the model needs
    conflict_ends: bool = False  # by itself
    verdicts: Mapping[int, Verdict] = field(default_factory=dict)  # of recovery, by group

    @property
    def again(self) -> float | None:
        """In how many seconds recovery must look once more."""
        return min((v.again for v in self.verdicts.values() if v.again is not None), default=None)

    @property
    def sentence(self) -> str:
        return "; ".join(action.reason for action in self.actions) or "everything is as the spec asks"


def decide(model: Model, observed: Observed, now: float, settings: Settings) -> Decision:
    """`now` is unix seconds."""
    groups, excess = groups_of(model, observed), excess_groups(model, observed)
    if remnant := _remnant(model, observed):
        return Decision(groups=groups, excess=excess, conflict=remnant, conflict_ends=True)
    if conflict := _conflict(model, observed):
        return Decision(groups=groups, excess=excess, conflict=conflict)
    shared = [*_token(model, observed), *_repaired(model, observed, desired.shared(model))]
    removed = list(_removed(model, observed, excess))
    if observed.token is None:
        return Decision(actions=(*shared, *removed), groups=groups, excess=excess)
    revision = desired.revision(model, observed.token, settings)
    turns = rollout.plan(groups, revision, model.max_unavailable)
    verdicts = {
        group.index: recover(model.recovery, _situation(model, observed, group, turn, now), now)
        for group, turn in zip(groups, turns, strict=True)
    }
    per_group = [
        action
        for group, turn in zip(groups, turns, strict=True)
        for action in _group(model, observed, group, turn, revision, settings, verdicts[group.index])
    ]
    actions = (*shared, *per_group, *removed, *_lost_pods(model, observed, now))
    return Decision(actions=actions, revision=revision, groups=groups, turns=turns, excess=excess, verdicts=verdicts)


def _situation(model: Model, observed: Observed, group: Group, turn: Turn, now: float) -> Situation:
    replaced = turn.step is Step.REPLACE or any(pod.revision != group.revision for pod in group.pods)
    return Situation(
        seed=f"{model.uid}/{group.index}",
        group=group,
        memory=from_status(block_of(observed.status, group.index).get("recovery")),
        report=observed.reports.get(group.index),
        trouble=trouble(group, observed.warnings, now),
        moving=f"group {group.index} is being replaced by revision {group.revision} anyway" if replaced else "",
    )


def _lost_pods(model: Model, observed: Observed, now: float) -> Iterator[Action]:
    if model.recovery.observe:
        return
    for pod in observed.pods:
        if lost(pod, now):
            reason = f"pod {pod.name} is lost with its node {pod.node}, which isn't heard from: it is given up"
            yield Delete("Pod", pod.name, pod.uid, reason, grace=0)


def _foreign(model: Model, observed: Observed) -> Iterator[tuple[str, str, Mapping[str, Any] | None]]:
    """Kind, name and owner of what has a name that the model needs and isn't its own."""
    for kind, name in expected_names(model):
        child = observed.child(kind, name)
        if child is not None and not is_ours(model, child):
            yield kind, name, controller(child)


def _remnant(model: Model, observed: Observed) -> str:
    for kind, name, owner in _foreign(model, observed):
        if owner is not None and owner.get("kind") == KIND and owner.get("name") == model.name:
            return f"{kind} {name} of a deleted model of the same name is still there; it is waited for"
    return ""


def _conflict(model: Model, observed: Observed) -> str:
    """Never take over what belongs to someone else."""
    for kind, name, owner in _foreign(model, observed):
        whose = f"belongs to {owner['kind']} {owner['name']}" if owner else "isn't Lockstep's"
        return f"{kind} {name} exists and {whose}: delete it, or give the model another name"
    return ""


def _token(model: Model, observed: Observed) -> Iterator[Action]:
    name = token_name(model.name)
    secret = observed.child("Secret", name)
    if secret is None:
        yield CreateToken(name, f"Secret {name} with the group's token is missing")
    elif observed.token is None and "deletionTimestamp" not in secret["metadata"]:
        yield Delete("Secret", name, secret["metadata"]["uid"], f"Secret {name} has lost its token and is made anew")


def _group(
    model: Model,
    observed: Observed,
    group: Group,
    turn: Turn,
    revision: str,
    settings: Settings,
    verdict: Verdict,
) -> Iterator[Action]:
    yield from _repaired(model, observed, desired.of_group(model, group.index, settings))
    if not desired.has_network_policy(model, settings):
        yield from _unwanted(model, observed, "NetworkPolicy", group.index, "is no longer asked for")
    if group.deleting:
        return
    if turn.step is Step.WAIT:
        yield from _recycled(verdict)
        return
    written = from_status(block_of(observed.status, group.index).get("recovery"))
    manifest = desired.stateful_set(model, group.index, revision, settings, sorted(written.avoided))
    if group.workload and (fixed := _fixed_differences(manifest, group.workload)):
        reason = f"StatefulSet {manifest['metadata']['name']} can't be changed in place ({fixed}) and is made anew"
        yield Delete("StatefulSet", manifest["metadata"]["name"], group.uid, reason)
        return
    if turn.step is Step.REPLACE:
        yield Apply("StatefulSet", manifest, turn.reason)
        return
    first = [*_repaired(model, observed, [manifest])]
    if group.settled:
        first += _outdated(group, revision)
    yield from first or _recycled(verdict)  # whose successors would else be made from the old template


def _recycled(verdict: Verdict) -> Iterator[Action]:
    for pod in verdict.targets:
        yield Delete("Pod", pod.name, pod.uid, verdict.reason, grace=RECYCLE_GRACE_SECONDS)


def _outdated(group: Group, revision: str) -> Iterator[Action]:
    for pod in group.pods:
        if pod.revision != revision and pod.deleting is None:
            yield Delete("Pod", pod.name, pod.uid, f"pod {pod.name} has revision {pod.revision} instead of {revision}")


def _fixed_differences(manifest: Mapping[str, Any], live: Mapping[str, Any]) -> str:
    wanted = {name: manifest["spec"][name] for name in _FIXED_IN_STATEFUL_SETS}
    return ", ".join(sorted(differences(wanted, live.get("spec") or {})))


def _repaired(model: Model, observed: Observed, manifests: list[desired.Manifest]) -> Iterator[Action]:
    for manifest in manifests:
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        live = observed.child(kind, name)
        if live is None:
            yield Apply(kind, manifest, f"{kind} {name} is missing", _loss(model, observed, manifest))
        elif "deletionTimestamp" not in live["metadata"] and (found := differences(manifest, live)):
            if found == observed.tolerated.get((kind, name)):
                continue
            listed = ", ".join(sorted(found))
            ours = any(
                "metadata.annotations" in difference for difference in found
            )  # we want something else than before
            yield Apply(kind, manifest, f"{kind} {name} differs: {listed}", "" if ours else listed)


def _loss(model: Model, observed: Observed, manifest: desired.Manifest) -> str:
    """Whether what is missing was there before: the status says so."""
    label = manifest["metadata"]["labels"].get(GROUP_LABEL)
    known = [str(group["group"]) for group in observed.status.get("groups") or [] if group.get("revision")]
    was_there = bool(observed.status.get("revision")) if label is None else label in known
    return "it was missing" if was_there else ""


def _removed(model: Model, observed: Observed, excess: tuple[Group, ...]) -> Iterator[Action]:
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
