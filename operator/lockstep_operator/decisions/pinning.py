"""Which rendering of their template a model's pods have (pure): the one that they got, until there is a reason to move.

What the operator renders depends on its version and its settings, the runtime's image among them, and an upgrade of
either must restart no pod. So every rendering is kept in a ControllerRevision before pods are made from it. The newest
of them is what the groups get, until what the spec says of the pods has changed, somebody asks for an update by
annotation, or it is the model's turn to be updated by itself; then it is rendered anew.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from lockstep_operator.decisions import manifests
from lockstep_operator.decisions.actions import Action, Delete
from lockstep_operator.decisions.manifests import Kept
from lockstep_operator.decisions.pod_template import Rendering, has_tokens, rendered, with_requests
from lockstep_operator.decisions.upkeep import repaired
from lockstep_operator.groups.group import Group, is_ours
from lockstep_operator.settings import Settings
from lockstep_operator.types import names
from lockstep_operator.types.model_status import Rollback, Runtime
from lockstep_operator.types.observed import Object, Observed
from lockstep_operator.types.spec import Model
from lockstep_operator.types.timestamps import parse_rfc3339


@dataclass(frozen=True, slots=True, kw_only=True)
class Pinned:
    """`history` has the current one, too, by revision."""

    current: Kept
    history: Mapping[str, Kept]
    outdated: bool
    rolled_back: bool = False  # the current one is not the spec's
    lost: str = ""  # the revision that was asked for and isn't kept


def pin(model: Model, observed: Observed, settings: Settings) -> Pinned:
    """The model's template must have no flaw."""
    kept = history(model, observed)
    newest = newest_of(kept)
    fresh = rendered(model, settings)
    if newest is None:
        first = _kept(model, fresh, Kept(revision="", number=0, shape="", requested=None, rendering={}))
        return Pinned(current=first, history={first.revision: first}, outdated=False)
    own = with_requests(newest.rendering, model)
    moves = newest.shape != model.shape or _asked(model, newest) or _takes_its_turn(model, observed)
    if not moves and not has_tokens(own) and own == newest.rendering:
        current = newest
    else:  # what this operator can't speak to isn't made again
        current = _kept(model, fresh if moves or not has_tokens(own) else own, newest)
    asked = rollback(model, observed.status.rollback)
    back = asked is not None and asked.shape == model.shape
    lost = model.rollback_to if back and model.rollback_to not in kept else ""
    if back and not lost:
        older = kept[model.rollback_to]
        again = with_requests(older.rendering, model)
        current = replace(older, revision=manifests.revision(model, again), rendering=again)
    return Pinned(
        current=current,
        history={**kept, current.revision: current},
        outdated=current.rendering != fresh,
        rolled_back=back and not lost,
        lost=lost,
    )


def runtime(model: Model, pinned: Pinned, groups: Sequence[Group], observed: Observed) -> Runtime:
    """As the status is to have it. A model's turn to be updated begins when it is well, and ends when it is again."""
    before, revision = observed.status.runtime, pinned.current.revision
    well = all(group.ready_at(revision) for group in groups)
    begins = pinned.outdated and not pinned.rolled_back and observed.may_update and well
    goes_on = before.updating and (pinned.outdated or not well)
    containers = pinned.current.rendering["template"]["spec"]["containers"]
    image = next(one.get("image", "") for one in containers if one["name"] == names.CONTAINER)
    return Runtime(image=image, outdated=pinned.outdated, updating=model.auto_update and (begins or goes_on))


def upkeep(model: Model, observed: Observed, pinned: Pinned, groups: Collection[Group]) -> Iterator[Action]:
    """The current rendering is kept, and of those that nothing uses any more the newest few."""
    yield from repaired(observed, [manifests.template(model, pinned.current)])
    used = {pinned.current.revision, model.rollback_to, *(group.revision for group in groups)}
    used |= {pod.revision for group in groups for pod in group.pods}
    unused = [one for one in pinned.history.values() if one.revision not in used]
    newest = max(pinned.history.values(), key=lambda one: one.number)
    for one in sorted(unused, key=lambda one: -one.number)[model.history_limit :]:
        child = observed.child("ControllerRevision", names.template_name(model.name, one.revision))
        if one is not newest and child is not None and "deletionTimestamp" not in child["metadata"]:
            name, uid = child["metadata"]["name"], child["metadata"]["uid"]
            yield Delete("ControllerRevision", name, uid, f"ControllerRevision {name} is older than those to be kept")


def history(model: Model, observed: Observed) -> dict[str, Kept]:
    """What is kept, by revision."""
    children = [child for (kind, _), child in observed.children.items() if kind == "ControllerRevision"]
    found = [_read(child) for child in children if is_ours(model, child)]
    return {one.revision: one for one in found}


def newest_of(kept: Mapping[str, Kept]) -> Kept | None:
    return max(kept.values(), key=lambda one: one.number, default=None)


def _read(child: Object) -> Kept:
    metadata = child["metadata"]
    annotations = metadata.get("annotations") or {}
    requested = annotations.get(names.UPDATE_ANNOTATION)
    return Kept(
        revision=metadata["labels"][names.REVISION_LABEL],
        number=child["revision"],
        shape=annotations.get(names.SHAPE_ANNOTATION, ""),
        requested=parse_rfc3339(requested) if requested else None,
        rendering=child["data"],
    )


def _kept(model: Model, rendering: Rendering, newest: Kept) -> Kept:
    revision = manifests.revision(model, rendering)
    requests = [time for time in (newest.requested, model.update_requested) if time is not None]
    return Kept(
        revision=revision,
        number=newest.number + (revision != newest.revision),
        shape=model.shape,
        requested=max(requests, default=None),
        rendering=rendering,
    )


def _asked(model: Model, newest: Kept) -> bool:
    asked = model.update_requested
    return asked is not None and (newest.requested is None or asked > newest.requested)


def _takes_its_turn(model: Model, observed: Observed) -> bool:
    return model.auto_update and observed.status.runtime.updating


def rollback(model: Model, known: Rollback | None) -> Rollback | None:
    """That is asked for, as the status is to have it: in force until the spec has another shape than when it was asked
    for, since what is new in the spec is then what is wanted."""
    if not model.rollback_to or (known is not None and known.revision == model.rollback_to):
        return known if model.rollback_to else None
    return Rollback(revision=model.rollback_to, shape=model.shape)
