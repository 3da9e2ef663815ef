"""Children of a model that are missing, that differ from what they should be, or that nobody wants any more (pure)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lockstep_operator.decisions.actions import Action, Apply, Delete
from lockstep_operator.decisions.drift import differences
from lockstep_operator.decisions.manifests import Manifest
from lockstep_operator.groups.group import Group, is_ours
from lockstep_operator.types.names import GROUP_LABEL, group_name
from lockstep_operator.types.observed import Object, ObjectRef, Observed
from lockstep_operator.types.spec import Model


def repaired(observed: Observed, wanted: Sequence[Manifest], needs: tuple[ObjectRef, ...] = ()) -> Iterator[Apply]:
    for manifest in wanted:
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        live = observed.child(kind, name)
        if live is None:
            lost = "it was missing" if _was_there(observed, manifest) else ""
            version = f"missing/{observed.resource_version}"
            yield Apply(kind, manifest, f"{kind} {name} is missing", lost, version=version, needs=needs)
        elif "deletionTimestamp" not in live["metadata"]:
            yield from _corrected(observed, manifest, live)


def _corrected(observed: Observed, manifest: Manifest, live: Object) -> Iterator[Apply]:
    kind, metadata = manifest["kind"], live["metadata"]
    found = differences(manifest, live)
    if not found or found == observed.server_mutations.get((kind, metadata["name"])):
        return
    listed = ", ".join(sorted(found))
    reason = f"{kind} {metadata['name']} differs: {listed}"
    ours = any("metadata.annotations" in difference for difference in found)  # we want something else than before
    uid, version = str(metadata["uid"]), str(metadata.get("resourceVersion", ""))
    yield Apply(kind, manifest, reason, "" if ours else listed, uid=uid, version=version)


def _was_there(observed: Observed, manifest: Manifest) -> bool:
    """By the status. What is missing then was deleted by somebody."""
    label = manifest["metadata"]["labels"].get(GROUP_LABEL)
    if label is None:
        return bool(observed.status.revision)
    last = observed.status.group(int(label))
    return bool(last.revision or last.leader_uid)


def scale_down(model: Model, observed: Observed, excess: Sequence[Group]) -> Iterator[Action]:
    """Groups that are no longer asked for: first the pods, which finish their requests, then the rest."""
    for group in excess:
        if group.workload is not None:
            if not group.deleting:
                reason = f"group {group.index} is beyond replicas {model.replicas}"
                yield Delete("StatefulSet", group_name(model.name, group.index), group.uid, reason)
        elif not observed.pods_of(group.index):
            for kind in ("Service", "NetworkPolicy"):
                yield from unwanted(model, observed, kind, group.index, "of the removed group is left over")


def unwanted(model: Model, observed: Observed, kind: str, group: int, why: str) -> Iterator[Action]:
    name = group_name(model.name, group)
    child = observed.child(kind, name)
    if child is not None and is_ours(model, child) and "deletionTimestamp" not in child["metadata"]:
        yield Delete(kind, name, child["metadata"]["uid"], f"{kind} {name} {why}")
