"""What the operator would do about a model (pure): its own planner, pass after pass, in a world where every pod that is
made becomes Ready.

Its user's machine knows neither the model's token nor the operator's settings, which are both in every revision. So all
revisions are computed anew with settings of ours and no token; the newest template that is kept counts as rendered
with these, or with older ones where the status says that the runtime is outdated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from msgspec.structs import replace as changed

from lockstep_operator.decisions import manifests, pinning, planner
from lockstep_operator.decisions.manifests import Kept
from lockstep_operator.decisions.pinning import Pinned
from lockstep_operator.decisions.planner import Decision
from lockstep_operator.decisions.pod_template import group_labels, rendered
from lockstep_operator.decisions.restart import with_restart
from lockstep_operator.decisions.rollout import RolloutStep
from lockstep_operator.groups.group import groups_of
from lockstep_operator.settings import Settings
from lockstep_operator.types.model_status import parse
from lockstep_operator.types.names import KIND, REVISION_LABEL, group_name
from lockstep_operator.types.observed import Object, Observed, Pod, parse_pod
from lockstep_operator.types.spec import Model

_OURS: Final = Settings(runtime_image="the operator's")
_OLDER: Final = Settings(runtime_image="an older one", log_format="json")
_NOW: Final = 0.0  # nothing that is asked here goes by time
_MOST_PASSES: Final = 10_000


@dataclass(slots=True)
class Course:
    """Groups of the model by what happens to them. `turns`: those that are replaced together, in order; `surge` ones
    stand in for them; `held` ones keep the revision that they have, because of the partition."""

    turns: list[list[int]] = field(default_factory=list)
    surge: list[int] = field(default_factory=list)
    created: list[int] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)


class World:
    """A live model with its StatefulSets, pods and ControllerRevisions."""

    def __init__(self, live: Object, model: Model, objects: Sequence[Object]) -> None:
        as_it_is = _observed(live, objects)
        self._names = _names(as_it_is, with_restart(model, groups_of(model, as_it_is)))
        self._observed = _observed(_renamed(live, self._names), _renamed([*objects], self._names))
        self._observed = replace(self._observed, children=self._children(model))
        self._was_automatic = model.auto_update

    def _children(self, before: Model) -> dict[tuple[str, str], Object]:
        """With the newest template as our settings render it."""
        children = {**self._observed.children}
        newest = pinning.newest_of(pinning.history(before, self._observed))
        for key, child in self._observed.children.items():
            if newest is not None and not before.flaw and _revision_of(child) == newest.revision:
                children[key] = {**child, "data": _as_kept(before, self._observed)}
        return children

    def pinned(self, model: Model) -> Pinned:
        """What the pods of such a model are made from; it must have no flaw."""
        observed = self._seen(model)
        model = with_restart(self._meant(model), groups_of(model, observed))
        return pinning.pin(model, observed, _OURS)

    def course(self, model: Model) -> Course:
        """What would happen until nothing more does."""
        model, observed, found = self._meant(model), self._seen(model), Course()
        if model.intervention.paused:
            return found
        model = with_restart(model, groups_of(model, observed))
        for _ in range(_MOST_PASSES):
            decision = planner.decide(model, observed, _NOW, _OURS)
            if decision.bugs:
                raise RuntimeError(f"the plan for {model.name} can't be made: {decision.bugs[0]}")
            _note(found, decision, model)
            following = _after(decision, model, observed)
            if following == observed:
                return found
            observed = following
        raise RuntimeError(f"the plan for {model.name} comes to no end")

    def _meant(self, model: Model) -> Model:
        return replace(model, rollback_to=self._names.get(model.rollback_to, model.rollback_to))

    def _seen(self, model: Model) -> Observed:
        """Its runtime has its turn to be updated by itself at some time, if the change asks for that."""
        runtime = self._observed.status.runtime
        updating = runtime.updating or (model.auto_update and not self._was_automatic and runtime.outdated)
        status = changed(self._observed.status, runtime=changed(runtime, updating=updating))
        return replace(self._observed, status=status)


def _observed(live: Object, objects: Sequence[Object]) -> Observed:
    """What a pass of the operator would see."""
    children = {(one["kind"], one["metadata"]["name"]): one for one in objects if one["kind"] != "Pod"}
    pods = tuple(pod for one in objects if one["kind"] == "Pod" and (pod := parse_pod(one)))
    return Observed(status=parse(live.get("status")), resource_version="", children=children, pods=pods)


def _revision_of(child: Object) -> str:
    """Of a template that is kept; empty of other objects."""
    labels = child["metadata"].get("labels") or {}
    return str(labels.get(REVISION_LABEL, "")) if child["kind"] == "ControllerRevision" else ""


def _as_kept(model: Model, observed: Observed) -> dict[str, Any]:
    return rendered(model, _OLDER if observed.status.runtime.outdated else _OURS)


def _names(observed: Observed, model: Model) -> dict[str, str]:
    """Revisions as they are computed here, by what they are called in the cluster."""
    history: Mapping[str, Kept] = pinning.history(model, observed)
    newest = pinning.newest_of(history)
    found = {name: manifests.revision(model, kept.rendering) for name, kept in history.items()}
    if newest is not None and not model.flaw:
        found[newest.revision] = manifests.revision(model, _as_kept(model, observed))
    return found


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _renamed(one, names) for key, one in value.items()}
    if isinstance(value, list):
        return [_renamed(one, names) for one in value]
    return names.get(value, value) if isinstance(value, str) else value


def _note(found: Course, decision: Decision, model: Model) -> None:
    steps = {one.group: one.step for one in decision.rollout}
    replaced = [index for index, step in steps.items() if step is RolloutStep.REPLACE and index < model.replicas]
    found.turns += [replaced] if replaced else []
    found.created += [index for index, step in steps.items() if step is RolloutStep.CREATE and index < model.replicas]
    found.surge += [one.group for one in decision.surge if one.group not in found.surge]
    found.removed += [group.index for group in decision.excess if group.index not in found.surge]
    found.held = [index for index, step in steps.items() if step is RolloutStep.HOLD]


def _after(decision: Decision, model: Model, observed: Observed) -> Observed:
    """The pass has done all that it decided, and every group is Ready."""
    gone = {group_name(model.name, group.index) for group in decision.excess}
    children = {key: child for key, child in observed.children.items() if key[1] not in gone}
    has = {one.group.index: one.group.revision for one in decision.groups if one.group.exists}
    gets = {
        one.group: one.revision for one in decision.rollout if one.step in (RolloutStep.CREATE, RolloutStep.REPLACE)
    }
    whole = {**has, **gets}
    children |= {
        ("StatefulSet", group_name(model.name, index)): _workload(model, index, rev) for index, rev in whole.items()
    }
    return replace(
        observed,
        children=children,
        pods=tuple(_pods(model, whole)),
        status=changed(observed.status, surge=decision.surge),
    )


def _workload(model: Model, index: int, revision: str) -> Object:
    name = group_name(model.name, index)
    owner = {"kind": KIND, "name": model.name, "uid": model.uid, "controller": True}
    labels = group_labels(model, index)
    template = {"metadata": {"labels": {REVISION_LABEL: revision}}}
    return {
        "kind": "StatefulSet",
        "metadata": {"name": name, "uid": name, "labels": labels, "ownerReferences": [owner]},
        "spec": {"replicas": model.pods_per_group, "template": template},
    }


def _pods(model: Model, groups: Mapping[int, str]) -> Iterator[Pod]:
    for group, revision in groups.items():
        owner = group_name(model.name, group)
        for index in range(model.pods_per_group):
            yield Pod(
                name=f"{owner}-{index}",
                uid=f"{owner}-{index}",
                group=group,
                index=index,
                revision=revision,
                ready=True,
                created=_NOW,
                deleting=None,
                ip="",
                owner_uid=owner,
                phase="Running",
                raw={"metadata": {"name": f"{owner}-{index}"}},
            )
