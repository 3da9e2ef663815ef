"""Now and then a few lists for all models at once show what no watch has told: whatever the indexes have otherwise.

An event that was lost, an object of which kopf has missed the end, a label that was taken off, a LimitRange. Such
models are looked at live; the others cost nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

from lockstep_operator.cluster.client import Kube, KubeError
from lockstep_operator.cluster.indexes import INDEXED, NOBODYS, Indexes, key_of
from lockstep_operator.types.names import ModelKey

log = logging.getLogger(__name__)

CENSUS_SECONDS: Final = 900.0
LIMITS: Final = "LimitRange"


class Census:
    """`namespaces` are those that are served; none: all."""

    def __init__(self, kube: Kube, indexes: Indexes, namespaces: Collection[str]) -> None:
        self._kube = kube
        self._indexes = indexes
        self._places = tuple(namespaces) or ("",)
        self._limits: Mapping[str, frozenset[str]] | None = None  # by namespace, as they were last time

    async def watch(self, doubt: Callable[[ModelKey], None]) -> None:
        """Until cancelled, `doubt` is told of models that must be looked at."""
        while True:
            await asyncio.sleep(CENSUS_SECONDS)
            try:
                doubted = await self.take()
            except KubeError as error:
                log.warning("what no watch tells can't be looked for now: %s", error)
                continue
            for key in doubted:
                log.info("%s: the watches have missed a change", key)
                doubt(key)

    async def take(self) -> set[ModelKey]:
        """Models of whose objects, or of whose namespace's limits, something else is so. Raises KubeError."""
        doubted: set[ModelKey] = set()
        for kind in INDEXED:
            known, listed = self._indexes.all_versions(kind), await self._listed(kind)
            doubted |= {key for key, _ in known.items() ^ listed.items() if key.name != NOBODYS}
        changed = await self._changed_limits()
        return doubted | {key for key in self._indexes.models() if key.namespace in changed}

    async def _listed(self, kind: str) -> dict[ModelKey, frozenset[tuple[str, str]]]:
        found: dict[ModelKey, set[tuple[str, str]]] = {}
        for metadata in await self._metadata(kind):
            found.setdefault(key_of(kind, metadata), set()).add((metadata["uid"], metadata["resourceVersion"]))
        return {key: frozenset(versions) for key, versions in found.items()}

    async def _changed_limits(self) -> set[str]:
        """Namespaces."""
        found: dict[str, set[str]] = {}
        for metadata in await self._metadata(LIMITS):
            found.setdefault(metadata["namespace"], set()).add(metadata["resourceVersion"])
        now = {namespace: frozenset(versions) for namespace, versions in found.items()}
        before, self._limits = self._limits, now
        return set() if before is None else {namespace for namespace, _ in before.items() ^ now.items()}

    async def _metadata(self, kind: str) -> list[Mapping[str, Any]]:
        return [metadata for place in self._places for metadata in await self._kube.survey(kind, place)]
