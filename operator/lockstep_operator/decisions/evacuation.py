"""Groups whose pods must leave their nodes: another group stands in first, and only then their pods go (pure).

A pod must leave when its node is cordoned, or when somebody says so by an annotation. One group is moved at a time. Its
other pods stay and keep their weights: the group drains as one, and is whole again when the pods are up elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from lockstep_operator.decisions.actions import Delete
from lockstep_operator.decisions.surge import Need
from lockstep_operator.groups.group import Group
from lockstep_operator.types.model_status import SurgeReason
from lockstep_operator.types.names import EVACUATE_ANNOTATION
from lockstep_operator.types.observed import Observed, Pod
from lockstep_operator.types.spec import Model
from lockstep_operator.types.timestamps import parse_rfc3339

CORDON: Final = "node.kubernetes.io/unschedulable"  # the taint; who tolerates it stays
NOTHING: Final = Need(reason=SurgeReason.EVACUATION, start=0, keep=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evacuation:
    """`leaving`: groups that serve and must be moved, with the reason. `overdue`: nobody could stand in for them in
    time, so that whoever drains their nodes may evict them."""

    leaving: Mapping[int, str] = field(default_factory=dict)
    need: Need = NOTHING
    moves: tuple[Delete, ...] = ()
    stand_ins: tuple[int, ...] = ()  # groups, Ready or not
    overdue: bool = False


def decide(
    model: Model, observed: Observed, groups: Sequence[Group], blocked: Collection[int], now: float
) -> Evacuation:
    """`groups` are all that there are to be; `blocked` can't exist. `now` is unix seconds."""
    asked = [one for one in groups if one.index < model.replicas and one.index not in model.intervention.fenced]
    leaving = {one.index: why for one in asked if one.ready and (why := _why(one, observed.leaving_nodes))}
    down = [one for one in asked if not one.ready]
    known = [one.group for one in observed.status.surge if one.reason == SurgeReason.EVACUATION]
    standing = [one for one in groups if one.index in known and one.ready]
    moved = [one for one in asked if one.index in leaving][: max(0, len(standing) - len(down))]
    return Evacuation(
        leaving=leaving,
        need=Need(reason=SurgeReason.EVACUATION, start=min(1, len(leaving)), keep=min(1, len(leaving) + len(down))),
        moves=tuple(move for one in moved for move in _moves(one, observed.leaving_nodes, known)),
        stand_ins=tuple(known),
        overdue=bool(leaving) and not standing and _is_overdue(model, groups, known, blocked, now),
    )


def _why(group: Group, nodes: Collection[str]) -> str:
    return next((why for pod in group.pods if (why := _must_leave(pod, nodes))), "")


def _must_leave(pod: Pod, nodes: Collection[str]) -> str:
    """A sentence; empty: it needn't."""
    if pod.deleting is not None:
        return ""
    annotations = pod.raw["metadata"].get("annotations") or {}
    if annotations.get(EVACUATE_ANNOTATION, "false") != "false":
        return f"pod {pod.name} has the annotation {EVACUATE_ANNOTATION}"
    if pod.node in nodes and not _stays(pod):
        return f"node {pod.node} of pod {pod.name} is cordoned"
    return ""


def _stays(pod: Pod) -> bool:
    """Its successor might be put on the same node."""
    tolerations = (pod.raw.get("spec") or {}).get("tolerations") or []
    return any(one.get("key", CORDON) == CORDON and one.get("operator") == "Exists" for one in tolerations)


def _moves(group: Group, nodes: Collection[str], known: Sequence[int]) -> Iterator[Delete]:
    by = ", ".join(map(str, known))
    for pod in group.pods:
        if why := _must_leave(pod, nodes):
            yield Delete(
                "Pod", pod.name, pod.uid, f"{why}: it goes, since group {by} stands in for group {group.index}"
            )


def _is_overdue(
    model: Model, groups: Sequence[Group], known: Sequence[int], blocked: Collection[int], now: float
) -> bool:
    """Whether a group that is to stand in has not been Ready for as long as anything may take, or can't exist."""
    made = [
        parse_rfc3339(one.workload["metadata"]["creationTimestamp"])
        for one in groups
        if one.index in known and one.workload
    ]
    return any(index in blocked for index in known) or any(now - at > model.progress_deadline for at in made)
