"""Trace and span of a group's recovery, computed from its record: whoever has the record can link to the trace."""

from __future__ import annotations

import hashlib

from lockstep_runtime.protocol.status import FaultRecord


def recovery_ids(model: str, group: int, record: FaultRecord) -> tuple[int, int]:
    """Of 128 and of 64 bits, neither 0."""
    text = f"{model}/{group}/{record.id}/{record.fault}/{record.at!r}"
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:16]) or 1, int.from_bytes(digest[16:24]) or 1
