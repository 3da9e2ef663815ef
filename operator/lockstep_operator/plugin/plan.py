"""`kubectl lockstep plan`: what applying a file would do to a model that serves (pure).

The operator's own planner decides: what pods are made from, and whose turn it is in a rollout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lockstep_operator.decisions.pod_template import pod_template
from lockstep_operator.plugin.foresight import Course, World
from lockstep_operator.settings import HUGGING_FACE, ModelSource, Settings
from lockstep_operator.types import spec
from lockstep_operator.types.model_status import parse
from lockstep_operator.types.names import CONTAINER, GROUP, PAUSED_ANNOTATION, ROLLBACK_ANNOTATION
from lockstep_operator.types.observed import Object
from lockstep_operator.types.spec import Model
from lockstep_operator.types.spec_values import SpecError


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One field of the spec, or an annotation. `restarts`: whether it alone would replace the groups' pods."""

    path: str
    before: Any
    after: Any
    restarts: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`turns`: groups that are replaced together, in order; `surge` groups stand in for them, `held` ones wait for the
    partition to be lowered. `seconds`: how long each group's last start took, as far as that is measured."""

    name: str
    changes: Sequence[Change]
    turns: Sequence[Sequence[int]] = ()
    surge: Sequence[int] = ()
    created: Sequence[int] = ()
    removed: Sequence[int] = ()
    replicas: int = 0
    seconds: Mapping[int, float]
    held: Sequence[int] = ()
    notes: Sequence[str] = ()
    flaw: str = ""  # what the operator would refuse, though the API server takes it


def understood(resource: Mapping[str, Any]) -> Model:
    """With any hub that it names, which only the operator knows. Raises SpecError."""
    hub = ((resource["spec"].get("model") or {}).get("huggingFace") or {}).get("source", HUGGING_FACE)
    return spec.parse(resource, [ModelSource(name=hub)])


def with_kept(manifest: Mapping[str, Any], live: Mapping[str, Any] | None) -> Object:
    """The file's model, with what stays when it is applied without that field: an autoscaler's `replicas`, the model's
    identity and annotations that restart it."""
    if live is None:
        return {**manifest}
    replicas = {"replicas": live["spec"]["replicas"]} if "replicas" in live["spec"] else {}
    old = live["metadata"]
    annotations = {**(old.get("annotations") or {}), **(manifest["metadata"].get("annotations") or {})}
    metadata = {**manifest["metadata"], **({"annotations": annotations} if annotations else {})}
    return {**manifest, "metadata": metadata, "spec": {**replicas, **manifest["spec"]}}


def plan(live: Object | None, wanted: Object, objects: Sequence[Object]) -> Plan:
    """`wanted` is the model as the API server would store it, `objects` are the live one's StatefulSets, pods and
    ControllerRevisions.
    Raises SpecError."""
    model = understood(wanted)
    name = model.name
    if live is None:
        return Plan(
            name=name, changes=(), created=range(model.replicas), replicas=model.replicas, seconds={}, flaw=model.flaw
        )
    world = World(live, understood(live), objects)
    course = Course() if model.flaw else world.course(model)
    return Plan(
        name=name,
        changes=[*_changes(live, wanted, world)],
        turns=course.turns,
        surge=course.surge,
        created=course.created,
        removed=course.removed,
        held=course.held,
        replicas=model.replicas,
        seconds=start_seconds(live),
        flaw=model.flaw,
        notes=[]
        if model.flaw
        else [*_notes(understood(live), model, world, parse(live.get("status")).runtime.outdated)],
    )


def start_seconds(live: Object) -> dict[int, float]:
    """By group: measured by the operator when it last started."""
    measured = {one.group: one.start_seconds for one in parse(live.get("status")).groups}
    return {group: seconds for group, seconds in measured.items() if seconds is not None}


def pod_manifest(model: Model, objects: Sequence[Object]) -> Object:
    """A pod of the model as a StatefulSet would make it, without the account that exists only once the model does. Its
    image is that of the live ones, if there are any."""
    template = pod_template(model, 0, "planned", Settings(runtime_image=_image(objects)))
    metadata = {**template["metadata"], "name": f"{model.name}-plan", "namespace": model.namespace}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": {**template["spec"], "serviceAccountName": "default"},
    }


def _image(objects: Sequence[Object]) -> str:
    pods = [one["spec"]["template"]["spec"] for one in objects if one["kind"] == "StatefulSet"]
    images = [one["image"] for pod in pods for one in pod["containers"] if one["name"] == CONTAINER]
    return images[0] if images else "lockstep/runtime"


def _notes(before: Model, model: Model, world: World, outdated: bool) -> Iterator[str]:
    """What the operator goes by beside the fields."""
    pinned = world.pinned(model)
    if model.intervention.paused:
        yield f"nothing is done as long as it has the annotation {PAUSED_ANNOTATION}"
    if pinned.lost:
        yield f"revision {model.rollback_to}, which {ROLLBACK_ANNOTATION} asks for, isn't kept: pods follow the spec"
    if pinned.rolled_back:
        yield f"pods are those of revision {model.rollback_to} until the spec says something else of them"
    if outdated and model.auto_update and not before.auto_update:
        yield "its runtime is updated when it is this model's turn among all that update by themselves"
    elif outdated and not pinned.outdated:
        yield "the runtime is updated along with that, to the operator's"


def _changes(live: Object, wanted: Object, world: World) -> Iterator[Change]:
    """Each changed field or annotation of ours, and whether it alone restarts groups."""
    before, after = _said(live), _said(wanted)
    base = _revision(understood(live), world)
    for path in sorted(_paths(before, after)):
        old, new = _at(before, path), _at(after, path)
        alone = _put(before, path, new)
        try:
            changed = _revision(understood(_with(live, alone)), world)
            restarts = changed not in ("", base)
        except (SpecError, KeyError, TypeError, ValueError):  # it makes sense only with the other changes
            restarts = True
        yield Change(path=".".join(path), before=old, after=new, restarts=restarts)


def _revision(model: Model, world: World) -> str:
    """Empty when its pods stay as they are, because nobody knows what they are to be."""
    return "" if model.flaw else world.pinned(model).current.revision


def _said(resource: Object) -> Object:
    """What the operator goes by."""
    annotations = resource["metadata"].get("annotations") or {}
    ours = {name: text for name, text in annotations.items() if name.startswith(f"{GROUP}/")}
    return {"metadata": {"annotations": ours}, "spec": resource["spec"]}


def _with(resource: Object, said: Object) -> Object:
    annotations = (said.get("metadata") or {}).get("annotations") or {}
    return {**resource, "metadata": {**resource["metadata"], "annotations": annotations}, "spec": said["spec"]}


def _paths(old: Any, new: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Of fields that differ; lists are compared whole."""
    known: list[Mapping[str, Any]] = [one if isinstance(one, Mapping) else {} for one in (old, new)]
    if all(one is None or isinstance(one, Mapping) for one in (old, new)) and any(known):
        for name in {*known[0], *known[1]}:
            yield from _paths(known[0].get(name), known[1].get(name), (*path, name))
    elif old != new:
        yield path


def _at(value: Any, path: Sequence[str]) -> Any:
    for name in path:
        value = (value or {}).get(name)
    return value


def _put(value: Any, path: Sequence[str], new: Any) -> Any:
    """A copy with this one field changed, or removed where `new` is None."""
    if not path:
        return new
    name, *rest = path
    inner = _put((value or {}).get(name), rest, new)
    kept = {key: item for key, item in (value or {}).items() if key != name}
    return kept if inner is None else {**kept, name: inner}


def text(found: Plan) -> str:
    """For people."""
    if not (found.changes or found.turns or found.created or found.removed or found.flaw):
        return f"{found.name}: nothing changes"
    return "\n".join([*_what(found), *_order(found)])


def _what(found: Plan) -> Iterator[str]:
    if found.flaw:
        yield f"{found.name}: the operator would keep the pods as they are: {found.flaw}"
    for change in found.changes:
        effect = "restarts groups" if change.restarts else "no restart"
        yield f"{found.name}: {change.path}: {_short(change.before)} -> {_short(change.after)} ({effect})"
    for note in found.notes:
        yield f"{found.name}: {note}"
    if found.held and found.changes:
        yield f"{found.name}: {_groups(found.held)} below rollout.partition: no other pods until that is lowered"
    if found.created:
        yield f"{found.name}: {_groups(found.created)} created"
    if found.removed:
        yield f"{found.name}: {_groups(found.removed)} removed, after their requests have finished"


def _order(found: Plan) -> Iterator[str]:
    known = [found.seconds[group] for turn in found.turns for group in turn if group in found.seconds]
    if found.surge:
        yield f"{found.name}: {_groups(found.surge)} made first, and removed in the end (maxSurge)"
    for number, turn in enumerate(found.turns, 1):
        seconds = [found.seconds[group] for group in turn if group in found.seconds]
        took = (
            f"about {max(seconds):.0f} s, as their last start took" if seconds else "for a time that isn't measured yet"
        )
        left = found.replicas - len(turn) + len(found.surge)
        serving = f"{left} of {found.replicas} groups serve" if left > 0 else "NO GROUP SERVES"
        yield f"{found.name}: turn {number}: {_groups(turn)} replaced, {took}; meanwhile {serving}"
    if known and len(found.turns) > 1:
        whole = sum(max(found.seconds.get(group, max(known)) for group in turn) for turn in found.turns)
        yield f"{found.name}: {len(found.turns)} turns, about {whole:.0f} s in all"


def _groups(indices: Sequence[int]) -> str:
    named = ", ".join(map(str, indices))
    return f"group {named} is" if len(indices) == 1 else f"groups {named} are"


def _short(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
