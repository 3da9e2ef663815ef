"""Everything that was seen of a model in one pass, as frozen types."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lockstep_operator.types.limits import Limits
from lockstep_operator.types.model_status import ModelStatus
from lockstep_operator.types.names import (
    GROUP_LABEL,
    OPERATOR_TOKEN_VOLUME,
    POD_INDEX_LABEL,
    REVISION_LABEL,
    account_name,
    group_name,
)
from lockstep_operator.types.spec import Model
from lockstep_operator.types.timestamps import parse_rfc3339
from lockstep_runtime.protocol.status import STATUS_PORT, GroupStatus

ObjectRef = tuple[str, str]  # kind and name
Object = dict[str, Any]  # as the API server gives it


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """A rank pod. Times are unix seconds."""

    name: str
    uid: str
    group: int
    index: int
    revision: str
    ready: bool
    created: float
    deleting: float | None  # when its grace ends
    ip: str
    owner_uid: str  # of the StatefulSet
    phase: str
    raw: Mapping[str, Any] = field(repr=False)

    @property
    def node(self) -> str:
        """Empty before it is scheduled."""
        return str((self.raw.get("spec") or {}).get("nodeName", ""))

    @property
    def conditions(self) -> Mapping[str, Object]:
        """By type."""
        return {one["type"]: one for one in (self.raw.get("status") or {}).get("conditions") or []}

    @property
    def containers(self) -> Sequence[Object]:
        """Their statuses, without init containers."""
        found: Sequence[Object] = (self.raw.get("status") or {}).get("containerStatuses") or []
        return found

    @property
    def status_port(self) -> int:
        """Where its supervisor listens: the spec may ask for another one by now."""
        containers = (self.raw.get("spec") or {}).get("containers") or []
        declared = (port for container in containers for port in container.get("ports") or [])
        return next((int(port["containerPort"]) for port in declared if port.get("name") == "status"), STATUS_PORT)

    @property
    def tokens_id(self) -> str:
        """Of the tokens that it has; empty for a pod of an older version, whose tokens nobody knows."""
        volumes = (self.raw.get("spec") or {}).get("volumes") or []
        secrets = (one["secret"] for one in volumes if one.get("name") == OPERATOR_TOKEN_VOLUME and "secret" in one)
        return next((str(secret.get("secretName", "")).rpartition("-")[2] for secret in secrets), "")

    @property
    def started(self) -> float | None:
        """When its containers were last started; None when one doesn't run."""
        running = [state for one in self.containers if (state := (one.get("state") or {}).get("running"))]
        if not running or self.phase != "Running" or len(running) < len(self.containers):
            return None
        return max(parse_rfc3339(state["startedAt"]) for state in running)


@dataclass(frozen=True, slots=True)
class GroupReport:
    """A group's last report: its status, or since when it can't be reached and why."""

    status: GroupStatus | None = None
    unreachable_since: float | None = None
    error: str = ""
    refused: bool = False  # it answers, but doesn't take the operator's token


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """Everything that belongs to a model, as observed in one pass."""

    status: ModelStatus  # of the custom resource, as last written
    resource_version: str
    children: Mapping[tuple[str, str], Object]  # by kind and name
    pods: tuple[Pod, ...] = ()
    reports: Mapping[int, GroupReport] = field(default_factory=dict)  # by group; only of the present first pods
    warnings: Mapping[str, str] = field(default_factory=dict)  # UID of a pod or StatefulSet → newest Warning about it
    server_mutations: Mapping[ObjectRef, frozenset[str]] = field(default_factory=dict)  # the API server's own rewriting
    failing: frozenset[ObjectRef] = frozenset()  # writes that the API server did not take lately
    limits: Limits = field(default_factory=Limits)  # of the namespace
    leaving_nodes: frozenset[str] = frozenset()  # cordoned ones
    suspicion: Mapping[str, int] = field(default_factory=dict)  # faults that all models hold against nodes
    operator_key: str = ""  # its id
    may_update: bool = False  # whether it is this model's turn, among all, to have its runtime updated

    def child(self, kind: str, name: str) -> Object | None:
        return self.children.get((kind, name))

    def fails(self, target: ObjectRef) -> bool:
        return target in self.failing

    def pods_of(self, group: int) -> tuple[Pod, ...]:
        return tuple(pod for pod in self.pods if pod.group == group)


def wanted_groups(model: Model, status: ModelStatus) -> tuple[int, ...]:
    """Indices of the groups that there are to be: as many as `replicas` says, and those that the status wants for a
    while beyond them."""
    return (*range(model.replicas), *(one.group for one in status.surge if one.group >= model.replicas))


def expected_names(model: Model, groups: Iterable[int]) -> list[tuple[str, str, int | None]]:
    """Kind and name of what the model needs, and the group that it is for, if it is for one. A list by label may miss
    some, because somebody removed the label."""
    shared = [("ServiceAccount", account_name(model.name)), ("Service", model.name)]
    of_group = ["StatefulSet", "Service", *(["NetworkPolicy"] if model.network.policy != "None" else [])]
    return [(kind, name, None) for kind, name in shared] + [
        (kind, group_name(model.name, group), group) for group in groups for kind in of_group
    ]


def parse_pod(raw: Mapping[str, Any]) -> Pod | None:
    """None for a pod that carries the model's label but is no rank pod."""
    metadata, status = raw["metadata"], raw.get("status") or {}
    labels = metadata.get("labels") or {}
    index = labels.get(POD_INDEX_LABEL, metadata["name"].rpartition("-")[2])
    owner = controller(raw)
    if not labels.get(GROUP_LABEL, "").isdigit() or not index.isdigit() or owner is None:
        return None
    return Pod(
        name=metadata["name"],
        uid=metadata["uid"],
        group=int(labels[GROUP_LABEL]),
        index=int(index),
        revision=labels.get(REVISION_LABEL, ""),
        ready=any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions") or []),
        created=parse_rfc3339(metadata["creationTimestamp"]),
        deleting=parse_rfc3339(metadata["deletionTimestamp"]) if metadata.get("deletionTimestamp") else None,
        ip=status.get("podIP", ""),
        owner_uid=owner["uid"],
        phase=status.get("phase", ""),
        raw=raw,
    )


def controller(child: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The owner reference of the object's controller."""
    references = child["metadata"].get("ownerReferences") or []
    return next((reference for reference in references if reference.get("controller")), None)
