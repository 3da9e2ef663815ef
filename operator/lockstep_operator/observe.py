"""What is so, read anew for every reconciliation: no cache can be stale, no event can be missed."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lockstep_operator.failures import Target
from lockstep_operator.kube import Kube, KubeError, Object
from lockstep_operator.limits import Limits, limits_of
from lockstep_operator.moment import unix
from lockstep_operator.names import (
    GROUP_LABEL,
    POD_INDEX_LABEL,
    REVISION_LABEL,
    TOKEN_KEY,
    account_name,
    group_name,
    selector,
    token_name,
)
from lockstep_operator.spec import Model
from lockstep_runtime.wire import GroupStatus

CHILD_KINDS = ("StatefulSet", "Service", "ServiceAccount", "NetworkPolicy")


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


@dataclass(frozen=True, slots=True)
class Report:
    """What a group last said of itself: its own words, or since when it can't be asked and why."""

    status: GroupStatus | None = None
    unreachable_since: float | None = None
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """One look at everything that belongs to a model."""

    status: Mapping[str, Any]  # of the custom resource, as last written
    resource_version: str
    token: str | None  # None: the Secret is missing or has no token
    children: Mapping[tuple[str, str], Object]  # by kind and name
    pods: tuple[Pod, ...] = ()
    reports: Mapping[int, Report] = field(default_factory=dict)  # by group; only of the present first pods
    warnings: Mapping[str, str] = field(default_factory=dict)  # UID of a pod or StatefulSet → newest Warning about it
    tolerated: Mapping[Target, frozenset[str]] = field(default_factory=dict)  # the API server's own rewriting
    failing: frozenset[Target] = frozenset()  # writes that the API server did not take lately
    limits: Limits = field(default_factory=Limits)  # of the namespace

    def child(self, kind: str, name: str) -> Object | None:
        return self.children.get((kind, name))

    def fails(self, target: Target) -> bool:
        return target in self.failing

    def pods_of(self, group: int) -> tuple[Pod, ...]:
        return tuple(pod for pod in self.pods if pod.group == group)


def expected_names(model: Model) -> list[tuple[str, str, int | None]]:
    """Kind and name of what the model needs, and the group that it is for, if it is for one. A list by label may miss
    some, because someone took the label off."""
    shared = [("Secret", token_name(model.name)), ("ServiceAccount", account_name(model.name)), ("Service", model.name)]
    of_group = ["StatefulSet", "Service", *(["NetworkPolicy"] if model.network.policy != "None" else [])]
    return [(kind, name, None) for kind, name in shared] + [
        (kind, group_name(model.name, group), group) for group in range(model.replicas) for kind in of_group
    ]


async def read_children(kube: Kube, model: Model) -> dict[tuple[str, str], Object]:
    """By kind and name. Raises KubeError."""
    lists = await asyncio.gather(
        *(kube.find(kind, model.namespace, labels=selector(model.name)) for kind in CHILD_KINDS)
    )
    found = {
        (kind, child["metadata"]["name"]): child
        for kind, children in zip(CHILD_KINDS, lists, strict=True)
        for child in children
    }
    missing = [(kind, name) for kind, name, _ in expected_names(model) if (kind, name) not in found]
    objects = await asyncio.gather(*(kube.get(kind, model.namespace, name) for kind, name in missing))
    return found | {key: child for key, child in zip(missing, objects, strict=True) if child is not None}


async def read_pods(kube: Kube, model: Model) -> tuple[Pod, ...]:
    """Pods that belong to the model's groups. Raises KubeError."""
    objects = await kube.find("Pod", model.namespace, labels=selector(model.name))
    return tuple(pod for raw in objects if (pod := parse_pod(raw)))


async def read_limits(kube: Kube, namespace: str) -> Limits:
    """What the namespace allows a container. An older role may not let the operator ask: then nothing is known."""
    try:
        return limits_of(await kube.find("LimitRange", namespace))
    except KubeError as error:
        if error.status == 403:
            return Limits()
        raise


async def read_warnings(kube: Kube, namespace: str, uids: Iterable[str]) -> dict[str, str]:
    """The newest Warning Event about each object, where there is one. They only explain: what can't be read is left
    out."""
    wanted = list(uids)
    lists = await asyncio.gather(
        *(kube.find("Event", namespace, fields=f"involvedObject.uid={uid},type=Warning") for uid in wanted),
        return_exceptions=True,
    )
    for answer in lists:
        if isinstance(answer, BaseException) and not isinstance(answer, KubeError):
            raise answer
    return {
        uid: _newest(events) for uid, events in zip(wanted, lists, strict=True) if isinstance(events, list) and events
    }


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
        created=unix(metadata["creationTimestamp"]),
        deleting=unix(metadata["deletionTimestamp"]) if metadata.get("deletionTimestamp") else None,
        ip=status.get("podIP", ""),
        owner_uid=owner["uid"],
        phase=status.get("phase", ""),
        raw=raw,
    )


def controller(child: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The owner reference of the object's controller."""
    references = child["metadata"].get("ownerReferences") or []
    return next((reference for reference in references if reference.get("controller")), None)


def token_of(secret: Mapping[str, Any] | None) -> str | None:
    encoded = ((secret or {}).get("data") or {}).get(TOKEN_KEY)
    return base64.b64decode(encoded).decode(errors="replace") or None if encoded else None


def _newest(events: list[Object]) -> str:
    def when(event: Object) -> str:
        series = event.get("series") or {}
        times = (event.get("lastTimestamp"), event.get("eventTime"), series.get("lastObservedTime"))
        return max((time for time in times if time), default="")

    newest = max(events, key=when)
    return f"{newest.get('reason', '')}: {newest.get('message', '')}"
