"""Whose turn it is to have its runtime updated, among all models that are updated by themselves: few at a time."""

from __future__ import annotations

from lockstep_operator.cluster.indexes import Indexes
from lockstep_operator.types.names import ModelKey
from lockstep_operator.types.observed import Object


class Turns:
    """Who has its turn is in its status, which is read once: from then on nobody else gives turns."""

    def __init__(self, most: int, indexes: Indexes) -> None:
        self._most = most
        self._indexes = indexes
        self._updating: set[ModelKey] | None = None

    def take(self, key: ModelKey) -> bool:
        """Whether it is the model's turn; if so it is kept for it until `give_back`."""
        if self._updating is None:
            self._updating = {one for one in self._indexes.models() if _is_updating(self._indexes.model(one))}
        if key not in self._updating and len(self._updating) >= self._most:
            return False
        self._updating.add(key)
        return True

    def give_back(self, key: ModelKey) -> None:
        if self._updating is not None:
            self._updating.discard(key)


def _is_updating(resource: Object | None) -> bool:
    status = (resource or {}).get("status") or {}
    return bool((status.get("runtime") or {}).get("updating"))
