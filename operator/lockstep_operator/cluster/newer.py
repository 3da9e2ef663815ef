"""What a live look or a write has shown of a model before its watches have told of it.

The indexes are behind the operator's own writes for a moment. With these laid over them a pass never sees less than the
pass before it, so it needs no live look after each write.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

from lockstep_operator.types.observed import Object, ObjectRef

HEARD_SECONDS: Final = 10.0  # what no watch has told of by then may have come and gone meanwhile


@dataclass(slots=True)
class Newer:
    """Of one model. Times are unix seconds."""

    _of: dict[str, tuple[str, Object, float]] = field(default_factory=dict)  # by UID: kind, object, since when

    def note(self, kind: str, item: Object, now: float) -> None:
        self._of[item["metadata"]["uid"]] = (kind, item, now)

    def overdue(self, now: float) -> bool:
        """Whether the watches should have told of something by now: only a live look finds what is so."""
        return any(now - since > HEARD_SECONDS for _, _, since in self._of.values())

    def over(self, indexed: Mapping[ObjectRef, Object], kinds: Collection[str]) -> dict[ObjectRef, Object]:
        """The newest of each, by kind and name; `indexed` has all of these kinds. What the indexes have is let go."""
        found = dict(indexed)
        for uid, (kind, item, _) in list(self._of.items()):
            if kind not in kinds:
                continue
            reference = (kind, item["metadata"]["name"])
            known = indexed.get(reference)
            if known is not None and version_of(known) >= version_of(item):
                del self._of[uid]
            else:
                found[reference] = item
        return found


def version_of(item: Object) -> int:
    """Resource versions of one kind are numbers that rise (KEP-5504)."""
    return int(item["metadata"]["resourceVersion"])
