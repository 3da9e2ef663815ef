"""The CRD that the cluster serves may be older than this operator, where it is no part of the release.

A server-side apply with one field that the schema lacks is refused as a whole. So missing fields are left out, and
reported by `/readyz`, a metric and the log. Recovery continues without what those fields would hold.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from lockstep_operator.cluster.client import Kube, KubeError
from lockstep_operator.reporting.metrics import Metrics
from lockstep_operator.types.names import GROUP, KIND, VERSION
from lockstep_operator.types.status_fields import Path, written_fields

log = logging.getLogger(__name__)

CHECK_SECONDS: Final = 60.0
WRITTEN: Final = written_fields()


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
        """Records that the API server has rejected them; returns whether that is new."""
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
