"""An operator's indexes over the fake API server, fed as kopf feeds its own: by lists and watches, which may lag."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from tests.support.kube_fake import FakeKube, Identity, clone

from lockstep_operator.cluster.indexes import BUDGET, INDEXED, Index, Indexes, entry
from lockstep_operator.types.names import KIND, MODEL_LABEL, ModelKey
from lockstep_operator.types.observed import Object

Known = tuple[Identity, str]  # with the UID: an object that is made anew under its name is another


class KubeWatch:
    """`indexes` are an operator's. What has happened is in them after `catch_up`, and not before."""

    def __init__(self, kube: FakeKube) -> None:
        self._kube = kube
        self._of: dict[str, dict[ModelKey, dict[Known, bytes]]] = {kind: {} for kind in INDEXED}
        self._seen: dict[Known, Object] = {}
        self.indexes: Final = Indexes()

    def catch_up(self, *, relisted: bool = False) -> None:
        """All events since the last time. `relisted`: the watch was down for so long that there are none, and kopf has
        listed what there is: it never hears that something is no more."""
        now = {(identity, item["metadata"]["uid"]): item for identity, item in self._watched()}
        for known in self._seen.keys() - now.keys():
            del self._seen[known]
            if not relisted:
                self._discard(known)
        for known, item in now.items():
            if self._seen.get(known) != item:
                self._seen[known] = clone(item)
                self._discard(known)
                for key, document in entry(known[0][0], self._seen[known]).items():
                    self._of[known[0][0]].setdefault(key, {})[known] = document
        for node in self._kube.nodes:
            self.indexes.heard_of_node(node, leaves=node in self._kube.cordoned)
        self.indexes.bind({kind: self._index(kind) for kind in INDEXED})

    def _watched(self) -> Iterator[tuple[Identity, Object]]:
        """As the label selectors of the watches have it."""
        for identity, item in self._kube.objects.items():
            kind, labels = identity[0], item["metadata"].get("labels") or {}
            if kind in (KIND, BUDGET) or (kind in INDEXED and MODEL_LABEL in labels):
                yield identity, item

    def _index(self, kind: str) -> Index:
        return {key: list(known.values()) for key, known in self._of[kind].items()}

    def _discard(self, known: Known) -> None:
        for objects in self._of[known[0][0]].values():
            objects.pop(known, None)
