"""Whether a status is worth writing (pure): measurements alone would have a busy model rewrite it for ever."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

Document = Mapping[str, Any]
VOLATILE: Final = frozenset({"stepLatency", "lastStepTime"})


def worth_writing(old: Document, new: Document) -> bool:
    """Of measurements only the first of each are."""
    return _lasting(new) != _lasting(old) or not _measured(new) <= _measured(old)


def _lasting(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _lasting(item) for name, item in value.items() if name not in VOLATILE}
    return [_lasting(item) for item in value] if isinstance(value, list) else value


def _measured(status: Document) -> frozenset[tuple[int | None, int | None]]:
    """Where there are latencies: of the model, of groups, of ranks."""
    groups = status.get("groups") or []
    ranks = [(group["group"], rank["rank"]) for group in groups for rank in group.get("ranks") or [] if _timed(rank)]
    return frozenset(
        [*([(None, None)] if _timed(status) else []), *((g["group"], None) for g in groups if _timed(g)), *ranks]
    )


def _timed(block: Document) -> bool:
    return bool(block.get("stepLatency"))
