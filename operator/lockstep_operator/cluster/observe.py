"""What is so, read anew for every reconciliation: no cache can be stale, no event can be missed."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterable, Mapping
from typing import Any

from lockstep_operator.cluster.client import Kube, KubeError
from lockstep_operator.types.limits import Limits, limits_of
from lockstep_operator.types.names import (
    TOKEN_KEY,
    selector,
)
from lockstep_operator.types.observed import Object, Pod, expected_names, parse_pod
from lockstep_operator.types.spec import Model

CHILD_KINDS = ("StatefulSet", "Service", "ServiceAccount", "NetworkPolicy")


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
