"""Each group of a model from outside: its StatefulSet and the pods that it owns (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lockstep_operator.types.names import GROUP_LABEL, REVISION_LABEL, group_name
from lockstep_operator.types.observed import Observed, Pod, controller, wanted_groups
from lockstep_operator.types.spec import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One group. Pods of a deleted StatefulSet of the same name are not counted: owners are compared by UID."""

    index: int
    workload: Mapping[str, Any] | None  # its StatefulSet
    pods: tuple[Pod, ...]
    strays: int = 0  # pods of a StatefulSet of the same name that is gone: they hold the names until they have ended

    @property
    def exists(self) -> bool:
        return self.workload is not None

    @property
    def uid(self) -> str:
        return str(self.workload["metadata"]["uid"]) if self.workload else ""

    @property
    def revision(self) -> str:
        """Of the StatefulSet's template: pods created now have it."""
        template = ((self.workload or {}).get("spec") or {}).get("template") or {}
        return str(((template.get("metadata") or {}).get("labels") or {}).get(REVISION_LABEL, ""))

    @property
    def wanted(self) -> int:
        return int(((self.workload or {}).get("spec") or {}).get("replicas", 0))

    @property
    def deleting(self) -> bool:
        return self.workload is not None and "deletionTimestamp" in self.workload["metadata"]

    @property
    def settled(self) -> bool:
        """Whether the StatefulSet controller has observed the newest template: pods deleted now are recreated from
        it."""
        if self.workload is None:
            return False
        seen = (self.workload.get("status") or {}).get("observedGeneration", 0)
        return int(seen) >= int(self.workload["metadata"].get("generation", 1))

    @property
    def ready(self) -> bool:
        """All pods exist, are Ready, not terminating, and of one revision."""
        alive = [pod for pod in self.pods if pod.ready and pod.deleting is None]
        one_revision = len({pod.revision for pod in alive}) == 1
        return self.exists and one_revision and len(alive) == self.wanted

    def ready_at(self, revision: str) -> bool:
        return self.ready and self.revision == revision and all(pod.revision == revision for pod in self.pods)

    @property
    def leader(self) -> Pod | None:
        return next((pod for pod in self.pods if pod.index == 0), None)


def groups_of(model: Model, observed: Observed) -> tuple[Group, ...]:
    """The groups that there are to be, whether they exist or not, by index: surge groups last."""
    return tuple(_group(model, observed, index) for index in wanted_groups(model, observed.status))


def excess_groups(model: Model, observed: Observed) -> tuple[Group, ...]:
    """Groups that nobody wants any more, of which something is left, highest first."""
    wanted = wanted_groups(model, observed.status)
    indices = {
        int(label)
        for child in observed.children.values()
        if is_ours(model, child) and (label := _group_label(child)).isdigit() and int(label) not in wanted
    }
    return tuple(_group(model, observed, index) for index in sorted(indices, reverse=True))


def is_ours(model: Model, child: Mapping[str, Any]) -> bool:
    owner = controller(child)
    return owner is not None and owner["uid"] == model.uid


def _group(model: Model, observed: Observed, index: int) -> Group:
    found = observed.child("StatefulSet", group_name(model.name, index))
    workload = found if found and is_ours(model, found) else None
    uid = workload["metadata"]["uid"] if workload else ""
    labelled = observed.pods_of(index)
    pods = sorted((pod for pod in labelled if pod.owner_uid == uid), key=lambda pod: pod.index)
    return Group(index=index, workload=workload, pods=tuple(pods), strays=len(labelled) - len(pods))


def _group_label(child: Mapping[str, Any]) -> str:
    return str((child["metadata"].get("labels") or {}).get(GROUP_LABEL, ""))
