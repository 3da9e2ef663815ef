"""Which pods may be evicted (pure): one budget per model, over all of its pods.

All pods of a group turn unready with the first that goes, so "all but one" is all groups but one: the others of that
group may go, for they are unhealthy, and no pod of another group may before it is whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from lockstep_operator.decisions import manifests
from lockstep_operator.decisions.actions import Action, Delete
from lockstep_operator.decisions.evacuation import Evacuation
from lockstep_operator.decisions.pod_template import group_labels
from lockstep_operator.decisions.upkeep import repaired
from lockstep_operator.groups.group import Group, is_ours
from lockstep_operator.settings import Settings
from lockstep_operator.types.observed import Object, Observed
from lockstep_operator.types.spec import Model

BUDGET: Final = "PodDisruptionBudget"


@dataclass(frozen=True, slots=True, kw_only=True)
class Disruption:
    """`foreign`: a budget of somebody else in the way of ours: it selects the model's pods, or has its name."""

    foreign: str = ""
    actions: tuple[Action, ...] = ()


def decide(
    model: Model, observed: Observed, groups: Sequence[Group], moving: Evacuation, settings: Settings
) -> Disruption:
    """`groups` are all that there are to be. A surge group counts when it serves, and one that stands in for a group
    that is moved does before: its pods don't all become Ready at the same moment."""
    foreign = next(_foreign(model, observed), "")
    if foreign or not model.disruption.has_budget:
        return Disruption(foreign=foreign, actions=(*_removed(model, observed, foreign),))
    awaited = () if moving.overdue else moving.stand_ins
    counted = sum(group.ready or group.index < model.replicas or group.index in awaited for group in groups)
    least = max(0, counted * model.pods_per_group - _evictable(model, moving, settings))
    return Disruption(actions=(*repaired(observed, [manifests.disruption_budget(model, least)]),))


def _evictable(model: Model, moving: Evacuation, settings: Settings) -> int:
    """How many pods may be evicted while all groups are whole: none of a group that is moved when another stands in for
    it, as the only one always is where cordoned nodes are known."""
    if moving.overdue:
        return 1
    alone = model.replicas == 1 and settings.watch_nodes
    return 0 if alone or moving.leaving else 1


def _foreign(model: Model, observed: Observed) -> Iterator[str]:
    pods = [labels for pod in observed.pods if (labels := pod.raw["metadata"].get("labels") or {})]
    for (kind, name), budget in sorted(observed.children.items()):
        if kind != BUDGET or is_ours(model, budget) or "deletionTimestamp" in budget["metadata"]:
            continue
        selector = (budget.get("spec") or {}).get("selector")
        selects = any(selected(selector, labels) for labels in pods or _planned(model))
        if selects or (name == model.name and model.disruption.has_budget):
            yield name


def _planned(model: Model) -> list[dict[str, str]]:
    """The labels of pods that there are not yet."""
    written = (model.template.get("metadata") or {}).get("labels") or {}
    return [{**written, **group_labels(model, group)} for group in range(max(1, model.replicas))]


def _removed(model: Model, observed: Observed, foreign: str) -> Iterator[Action]:
    own = observed.child(BUDGET, model.name)
    if own is not None and is_ours(model, own) and "deletionTimestamp" not in own["metadata"]:
        why = f"{foreign} selects the same pods, and two make evictions fail" if foreign else "it is not asked for"
        yield Delete(BUDGET, model.name, own["metadata"]["uid"], f"{BUDGET} {model.name} is removed: {why}")


def selected(selector: Mapping[str, Any] | None, labels: Mapping[str, str]) -> bool:
    """Whether a label selector of policy/v1 matches: an empty one does everything, none at all nothing."""
    if selector is None:
        return False
    wanted = (selector.get("matchLabels") or {}).items()
    terms: Sequence[Object] = selector.get("matchExpressions") or []
    return all(labels.get(name) == value for name, value in wanted) and all(_holds(term, labels) for term in terms)


def _holds(term: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    value, values = labels.get(term["key"]), term.get("values") or []
    match term["operator"]:
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case _:  # DoesNotExist
            return value is None
