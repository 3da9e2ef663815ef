"""What namespaces allow a container. No watch tells of it: it is asked for, once for all models of a namespace."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable

from lockstep_operator.cluster.client import Kube, KubeError
from lockstep_operator.types.limits import Limits, limits_of


class NamespaceLimits:
    """`now` is in seconds."""

    def __init__(self, kube: Kube, now: Callable[[], float]) -> None:
        self._kube = kube
        self._now = now
        self._asking: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._known: dict[str, tuple[float, Limits]] = {}  # by namespace: when they were read, and what they were

    async def read(self, namespace: str) -> Limits:
        """As they are now. An older role may not let the operator ask: then nothing is known. Raises KubeError."""
        try:
            found = limits_of(await self._kube.find("LimitRange", namespace))
        except KubeError as error:
            if error.status != 403:
                raise
            found = Limits()
        self._known[namespace] = (self._now(), found)
        return found

    async def recent(self, namespace: str, seconds: float) -> Limits:
        """As they were so long ago at most. Raises KubeError."""
        async with self._asking[namespace]:  # models of one namespace come together when an operator starts
            known = self._known.get(namespace)
            if known is None or self._now() - known[0] > seconds:
                return await self.read(namespace)
            return known[1]
