"""The CRD that the cluster serves may be older than this operator: Helm never upgrades CRDs by itself.

A server-side apply with one field that the schema lacks is refused as a whole. So what is lacking is left out, and
told: by `/readyz`, a metric and the log. Recovery goes on; what the fields that are left out hold is not remembered.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from lockstep_operator.cluster.client import Kube, KubeError
from lockstep_operator.reporting.metrics import Metrics
from lockstep_operator.types.names import GROUP, KIND, VERSION

log = logging.getLogger(__name__)

CHECK_SECONDS: Final = 60.0
Path = tuple[str, ...]  # names from the top of the object, without the keys of lists

# All fields of the status that this operator may write: a test compares them with the CRD and with what it writes.
WRITTEN: Final[frozenset[Path]] = frozenset(
    tuple(line.split("."))
    for line in [
        "status.observedGeneration",
        "status.conditions",
        "status.conditions.type",
        "status.conditions.status",
        "status.conditions.reason",
        "status.conditions.message",
        "status.conditions.observedGeneration",
        "status.conditions.lastTransitionTime",
        "status.replicas",
        "status.readyReplicas",
        "status.updatedReplicas",
        "status.selector",
        "status.revision",
        "status.ranks",
        "status.stepLatency",
        "status.stepLatency.p50",
        "status.stepLatency.p99",
        "status.recoveries",
        "status.lastFault",
        "status.lastFault.fault",
        "status.lastFault.group",
        "status.lastFault.rank",
        "status.lastFault.message",
        "status.lastFault.time",
        "status.lastFault.rung",
        "status.lastFault.recoveredTime",
        "status.lastRecovery",
        "status.lastRecovery.fault",
        "status.lastRecovery.group",
        "status.lastRecovery.suspectRank",
        "status.lastRecovery.rung",
        "status.lastRecovery.phases",
        "status.lastRecovery.requestsResumed",
        "status.lastRecovery.finishedAt",
        "status.groups",
        "status.groups.group",
        "status.groups.ready",
        "status.groups.state",
        "status.groups.message",
        "status.groups.revision",
        "status.groups.epoch",
        "status.groups.leader",
        "status.groups.leaderUID",
        "status.groups.incarnation",
        "status.groups.recoveries",
        "status.groups.lastFaultID",
        "status.groups.lastRepairID",
        "status.groups.stepLatency",
        "status.groups.stepLatency.p50",
        "status.groups.stepLatency.p99",
        "status.groups.lastStepTime",
        "status.groups.readyRanks",
        "status.groups.podProblem",
        "status.groups.podProblem.reason",
        "status.groups.podProblem.message",
        "status.groups.podProblem.time",
        "status.groups.waiting",
        "status.groups.waiting.reason",
        "status.groups.waiting.since",
        "status.groups.waiting.revision",
        "status.groups.recovery",
        "status.groups.recovery.rung",
        "status.groups.recovery.trigger",
        "status.groups.recovery.fault",
        "status.groups.recovery.suspectRank",
        "status.groups.recovery.message",
        "status.groups.recovery.pods",
        "status.groups.recovery.time",
        "status.groups.recovery.faultTime",
        "status.groups.recovery.incarnation",
        "status.groups.recovery.onlySaid",
        "status.groups.recovery.healed",
        "status.groups.recovery.spent",
        "status.groups.recovery.spent.recyclePod",
        "status.groups.recovery.spent.recycleGroup",
        "status.groups.recovery.spent.moveAway",
        "status.groups.recovery.failures",
        "status.groups.recovery.nextTryTime",
        "status.groups.recovery.healthySince",
        "status.groups.recovery.stalled",
        "status.groups.recovery.nodes",
        "status.groups.recovery.nodes.name",
        "status.groups.recovery.nodes.faults",
        "status.groups.recovery.nodes.avoidedUntil",
        "status.groups.ranks",
        "status.groups.ranks.rank",
        "status.groups.ranks.pod",
        "status.groups.ranks.node",
        "status.groups.ranks.state",
        "status.groups.ranks.epoch",
        "status.groups.ranks.respawns",
        "status.groups.ranks.stepLatency",
        "status.groups.ranks.stepLatency.p50",
        "status.groups.ranks.stepLatency.p99",
        "status.groups.ranks.lastStepTime",
        "status.groups.ranks.message",
    ]
)


class ServedSchema:
    """Which of the fields that this operator writes the served schema lacks."""

    def __init__(self) -> None:
        self._lacking: frozenset[Path] = frozenset()

    @property
    def problem(self) -> str:
        """A sentence; empty when nothing is lacking."""
        if not self._lacking:
            return ""
        listed = sorted(".".join(path) for path in self._lacking)
        named = ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
        return f"the CRD of the cluster is older than the operator, it lacks {named}: apply the CRD of this version"

    @property
    def lacking(self) -> int:
        return len(self._lacking)

    def lacks(self, paths: Iterable[Path]) -> bool:
        """The API server has said so. Whether that is news."""
        before = self._lacking
        self._lacking = before | {path for path in paths if path[:1] == ("status",)}
        if self._lacking != before:
            log.error("%s", self.problem)
        return self._lacking != before

    def learn(self, schemas: Mapping[str, Any]) -> None:
        """What the API server publishes: `components.schemas` of OpenAPI v3."""
        schema = next((one for one in schemas.values() if _is_of_kind(one)), None)
        if schema is None:
            return
        served = frozenset(_paths(schema, ()))
        lacking = frozenset(path for path in WRITTEN if path not in served and path[:-1] in served)
        if lacking != self._lacking:
            self._lacking = lacking
            log.log(logging.ERROR if lacking else logging.INFO, "%s", self.problem or "the CRD has every field")

    def fitting(self, status: Mapping[str, Any]) -> dict[str, Any]:
        """The status without what the schema lacks."""
        found: dict[str, Any] = (
            _without({"status": status}, (), self._lacking)["status"] if self._lacking else {**status}
        )
        return found


async def watch(kube: Kube, schema: ServedSchema, metrics: Metrics) -> None:
    """Until cancelled: a CRD is also upgraded while the operator runs."""
    while True:
        try:
            schema.learn(await kube.served_schema())
        except KubeError as error:
            log.warning(
                "the served schema can't be read, so it isn't known whether the CRD is this version's: %s", error
            )
        metrics.unserved_fields.set(schema.lacking)
        await asyncio.sleep(CHECK_SECONDS)


def _is_of_kind(schema: Mapping[str, Any]) -> bool:
    kinds = schema.get("x-kubernetes-group-version-kind") or []
    return {"group": GROUP, "kind": KIND, "version": VERSION} in kinds


def _paths(schema: Mapping[str, Any], path: Path) -> Iterator[Path]:
    yield path
    inner = schema.get("items") or schema
    for name, part in (inner.get("properties") or {}).items():
        yield from _paths(part, (*path, name))


def _without(value: Any, path: Path, lacking: frozenset[Path]) -> Any:
    if isinstance(value, Mapping):
        return {
            name: _without(item, (*path, name), lacking) for name, item in value.items() if (*path, name) not in lacking
        }
    return [_without(item, path, lacking) for item in value] if isinstance(value, list) else value
