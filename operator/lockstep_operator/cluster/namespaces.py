"""Which of the namespaces that it is told to serve the operator may watch just now.

kopf gives up altogether over a single watch that it isn't granted, and a Role goes with its namespace. So it is told
only of namespaces that can be read, and is started anew when that changes, with empty indexes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from typing import Final

from lockstep_operator.cluster.client import Kube, KubeError
from lockstep_operator.cluster.indexes import INDEXED
from lockstep_operator.reporting.metrics import Metrics
from lockstep_operator.types.names import KIND

log = logging.getLogger(__name__)

LOOK_SECONDS: Final = 20.0  # kopf bears a refusal for 54 s
NOTHING: Final = "metadata.name=-"  # no object can be called so: what is asked is whether one may ask


class Namespaces:
    """`names` are all that should be served; none means the whole cluster, in which nothing is looked at."""

    def __init__(self, names: Collection[str], kube: Kube, metrics: Metrics) -> None:
        self._names = tuple(names)
        self._kube = kube
        self._metrics = metrics
        self._why_not: dict[str, str] = {}
        self.served: frozenset[str] = frozenset()

    def serves(self, namespace: str) -> bool:
        return not self._names or namespace in self.served

    async def look(self) -> None:
        """Ask the API server about each; where it can't say, things are as they were."""
        refusals = await asyncio.gather(*(self._refusal(name) for name in self._names))
        for name, refusal in zip(self._names, refusals, strict=True):
            if refusal is not None:
                self._tell(name, refusal)

    async def other_than(self, watched: frozenset[str]) -> None:
        """Wait until others than these can be served; for ever where the whole cluster is."""
        while not self._names or self.served == watched:
            await asyncio.sleep(LOOK_SECONDS)
            await self.look()

    async def _refusal(self, namespace: str) -> str | None:
        """Why it can't be watched, empty if it can; None when nobody knows."""
        try:
            await asyncio.gather(*(self._kube.find(kind, namespace, fields=NOTHING) for kind in INDEXED))
        except KubeError as error:
            return None if error.transient else str(error)
        return ""

    def _tell(self, name: str, refusal: str) -> None:
        if refusal and self._why_not.get(name) != refusal:
            log.warning(
                "namespace %s can't be served until it is there and grants the operator its Role: %s", name, refusal
            )
        if not refusal and name not in self.served:
            log.info("serving %s in namespace %s", KIND, name)
        self._why_not[name] = refusal
        self.served = self.served - {name} if refusal else self.served | {name}
        self._metrics.namespace(name, served=not refusal)
