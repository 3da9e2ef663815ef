"""The condition `LockstepSuspect` of nodes, where it is switched on: what repairs nodes (NVSentinel, Karpenter) may act
on it.

A node is suspect while models hold two faults or more against it. When an operator starts it looks which nodes carry
the condition, so that none stays suspect because an operator ended.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, Protocol

from lockstep_operator.cluster.client import KubeError
from lockstep_operator.decisions.node_suspicion import SUSPICION_SECONDS, suspects
from lockstep_operator.types.names import FIELD_MANAGER
from lockstep_operator.types.observed import Object
from lockstep_operator.types.timestamps import format_rfc3339

log = logging.getLogger(__name__)

CONDITION: Final = "LockstepSuspect"
LOOK_SECONDS: Final = 10.0
LEARNING_SECONDS: Final = 30.0  # after a start, at least: by then there are models to look at
_APPLY: Final = {"fieldManager": f"{FIELD_MANAGER}-nodes", "force": "true"}


class Requests(Protocol):
    async def request(
        self, method: str, path: str, query: Mapping[str, str] = ..., body: Object | None = None, content: str = ...
    ) -> Object: ...


class NodeConditions:
    """Writes only what differs from what it wrote last: at rest it makes no request."""

    def __init__(
        self,
        kube: Requests,
        suspicion: Callable[[], Mapping[str, int]],
        now: Callable[[], float],
        knows_all: Callable[[], bool] = lambda: True,
    ) -> None:
        """`knows_all`: whether every model has been looked at since this operator began."""
        self._kube = kube
        self._suspicion = suspicion
        self._knows_all = knows_all
        self._now = now
        self._began = now()
        self._known = False  # which nodes carry the condition
        self._written: dict[str, int] = {}  # suspect node → faults that are told

    async def watch(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self.look()
            except KubeError as error:
                log.warning("nodes' conditions can't be brought up to date, which is tried again: %s", error)
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """Raises KubeError."""
        if not self._known:
            self._written = dict.fromkeys(_suspect(await self._kube.request("get", "/api/v1/nodes")), 0)
            self._known = True
        faults = self._suspicion()
        wanted = {node: faults[node] for node in suspects(faults)}
        for node, count in wanted.items():
            if self._written.get(node) != count:
                await self._write(node, count)
        over = [node for node in self._written if node not in wanted]
        if over and self._now() - self._began >= LEARNING_SECONDS and self._knows_all():
            for node in over:
                await self._write(node, 0)

    async def _write(self, node: str, count: int) -> None:
        body = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": node},
            "status": {"conditions": [_condition(count, self._now())]},
        }
        try:
            await self._kube.request(
                "patch", f"/api/v1/nodes/{node}/status", _APPLY, body, "application/apply-patch+yaml"
            )
        except KubeError as error:
            if error.status != 404:  # the node is gone, as it should be
                raise
        if count:
            self._written[node] = count
        else:
            self._written.pop(node, None)


def _condition(count: int, now: float) -> dict[str, Any]:
    minutes = f"{SUSPICION_SECONDS / 60:g} minutes"
    text = (
        f"{count} faults of ranks on this node: kubectl get tpm -A shows whose, kubectl describe node which"
        if count
        else f"no model holds faults against it any more (for {minutes} after the newest)"
    )
    at = format_rfc3339(now)
    return {
        "type": CONDITION,
        "status": "True" if count else "False",
        "reason": "RanksFailed" if count else "NoRecentFaults",
        "message": text,
        "lastTransitionTime": at,
        "lastHeartbeatTime": at,
    }


def _suspect(nodes: Mapping[str, Any]) -> Collection[str]:
    """That carry the condition."""
    return [
        node["metadata"]["name"]
        for node in nodes.get("items") or []
        for condition in (node.get("status") or {}).get("conditions") or []
        if (condition["type"], condition["status"]) == (CONDITION, "True")
    ]
