"""What to do about one group (pure): its part in a rollout, its upkeep, its recovery."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from lockstep_operator.decisions import manifests, recovery_policy
from lockstep_operator.decisions.actions import Action, Apply, Delete
from lockstep_operator.decisions.commit_pin import given_commit
from lockstep_operator.decisions.drift import differences
from lockstep_operator.decisions.group_metadata import readmitted
from lockstep_operator.decisions.guard import Guard
from lockstep_operator.decisions.manifests import Kept
from lockstep_operator.decisions.recovery_policy import RecoveryDecision, RecoveryInput
from lockstep_operator.decisions.rollout import RolloutDecision, RolloutStep
from lockstep_operator.decisions.upkeep import repaired, unwanted
from lockstep_operator.groups.facts import GroupFacts
from lockstep_operator.groups.group import Group
from lockstep_operator.groups.waiting import recovering_since
from lockstep_operator.settings import Settings
from lockstep_operator.types.names import group_name
from lockstep_operator.types.observed import ObjectRef, Observed
from lockstep_operator.types.spec import Model

RECYCLE_GRACE_SECONDS: Final = 5  # a group that can't serve has nothing to finish
_FIXED_IN_STATEFUL_SETS: Final = ("serviceName", "podManagementPolicy", "selector")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlan:
    """`urgent` are pods that recovery deletes, `upkeep` all else."""

    group: int
    recovery: RecoveryDecision | None
    urgent: tuple[Action, ...]
    upkeep: tuple[Action, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlanner:
    """What decisions about all groups go by. Without a revision nobody knows what pods are to be."""

    model: Model
    observed: Observed
    revision: str
    templates: Mapping[str, Kept]  # by revision
    needs: tuple[ObjectRef, ...]  # what must be written before any pod is made
    settings: Settings
    now: float
    guard: Guard
    commit: str = ""  # that the hub's model is pinned to

    def plan(self, facts: GroupFacts, rollout: RolloutDecision) -> GroupPlan:
        group, where = facts.group, f"group {facts.group.index}"
        fenced = group.index in self.model.intervention.fenced
        recovery = None if fenced else self.guard(where, lambda: self._recovery(facts, rollout), None)
        upkeep: tuple[Action, ...] = ()
        if self.revision:
            replaced = rollout.step is RolloutStep.REPLACE or bool(recovery and recovery.targets)
            upkeep = self.guard(where, lambda: (*self._upkeep(facts, rollout, replaced=replaced),), upkeep)
        waits = group.deleting or self._template_changes(upkeep)
        urgent = () if recovery is None or waits else (*_delete_pods(recovery),)
        return GroupPlan(group=group.index, recovery=recovery, urgent=urgent, upkeep=upkeep)

    def _recovery(self, facts: GroupFacts, rollout: RolloutDecision) -> RecoveryDecision:
        group = facts.group
        refused = self.observed.fails(("StatefulSet", group_name(self.model.name, group.index)))
        taken = rollout.step is RolloutStep.REPLACE and not refused
        moving = taken or any(pod.revision != group.revision for pod in group.pods)
        known = RecoveryInput(
            seed=f"{self.model.uid}/{group.index}",
            group=group,
            state=facts.last.recovery,
            recovering_since=recovering_since(facts.last.waiting),
            report=facts.report,
            suspicion=self.observed.suspicion,
            issue=facts.issue,
            moving=f"group {group.index} is being replaced by revision {group.revision} anyway" if moving else "",
        )
        return recovery_policy.decide(self.model.recovery, known, self.now)

    def _upkeep(self, facts: GroupFacts, rollout: RolloutDecision, *, replaced: bool) -> Iterator[Action]:
        """`replaced`: pods of the group are about to go."""
        model, observed, group = self.model, self.observed, facts.group
        beside = [*repaired(observed, manifests.of_group(model, group.index, self.settings))]
        yield from beside
        if not manifests.has_network_policy(model, self.settings):
            yield from unwanted(model, observed, "NetworkPolicy", group.index, "is no longer asked for")
        kept, stays = self.templates.get(rollout.revision), rollout.step in (RolloutStep.WAIT, RolloutStep.HOLD)
        if group.deleting or kept is None or rollout.step is RolloutStep.LEAVE:
            return
        avoid, commit = sorted(facts.last.recovery.avoided), given_commit(group) if stays else self.commit
        wanted = manifests.stateful_set(
            model, group.index, kept.revision, kept.rendering, avoid, observed.limits, commit
        )
        if not stays:
            yield from self._stateful_set(group, rollout, wanted, beside, replaced=replaced)
        elif not _fixed_differences(wanted, group.workload or {}) and not readmitted(wanted, group.workload or {}):
            yield from repaired(observed, [wanted])

    def _stateful_set(
        self,
        group: Group,
        rollout: RolloutDecision,
        wanted: manifests.Manifest,
        beside: Collection[Action],
        *,
        replaced: bool,
    ) -> Iterator[Action]:
        name = wanted["metadata"]["name"]
        if group.workload and (fixed := _fixed_differences(wanted, group.workload)):
            reason = f"StatefulSet {name} can't be changed in place ({fixed}) and is recreated"
            yield Delete("StatefulSet", name, group.uid, reason)
            return
        if group.workload and readmitted(wanted, group.workload):
            if replaced:  # until then it stays as its queue admitted it
                yield Delete(
                    "StatefulSet", name, group.uid, f"StatefulSet {name} is recreated: its queue admits it anew"
                )
            return
        if rollout.step is RolloutStep.REPLACE and group.revision != self.revision:
            yield Apply("StatefulSet", wanted, rollout.reason, uid=group.uid, needs=self.needs)
            return
        # No pod before the wall around it.
        needs = (*self.needs, *(action.target for action in beside if not group.exists))
        first = [*repaired(self.observed, [wanted], needs)]
        yield from first
        if group.settled and all(self.observed.fails(action.target) for action in first):
            yield from _outdated(group, rollout.revision)
            if rollout.step is RolloutStep.REPLACE and not first:  # its template has the right commit by now
                yield from _astray(group, rollout.reason)

    def _template_changes(self, actions: Collection[Action]) -> bool:
        """Whether pods that went now would come back from a template that is about to change. One that the API server
        doesn't take is not about to."""
        return any(action.target[0] == "StatefulSet" and not self.observed.fails(action.target) for action in actions)


def _delete_pods(recovery: RecoveryDecision) -> Iterator[Action]:
    for pod in recovery.targets:
        yield Delete("Pod", pod.name, pod.uid, recovery.reason, grace=RECYCLE_GRACE_SECONDS)


def _outdated(group: Group, revision: str) -> Iterator[Action]:
    for pod in group.pods:
        if pod.revision != revision and pod.deleting is None:
            yield Delete("Pod", pod.name, pod.uid, f"pod {pod.name} has revision {pod.revision} instead of {revision}")


def _astray(group: Group, reason: str) -> Iterator[Action]:
    for pod in group.pods:
        if pod.deleting is None:
            yield Delete("Pod", pod.name, pod.uid, f"pod {pod.name} is replaced: {reason}")


def _fixed_differences(manifest: Mapping[str, Any], live: Mapping[str, Any]) -> str:
    wanted = {name: manifest["spec"][name] for name in _FIXED_IN_STATEFUL_SETS}
    return ", ".join(sorted(differences(wanted, live.get("spec") or {})))
