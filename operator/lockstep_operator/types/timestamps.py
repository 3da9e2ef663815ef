"""Points in time, as the API server writes them (RFC 3339, whole seconds, UTC) and as unix seconds; durations."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final

_PART: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h)")
_SECONDS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_rfc3339(text: str) -> float:
    """Unix seconds. Raises ValueError."""
    return datetime.fromisoformat(text).timestamp()


def format_rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def format_micro(seconds: float) -> str:
    """With microseconds, as Events want it."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def duration(text: str) -> float:
    """Seconds of a duration such as 120s, 1m30s or 500ms. Raises ValueError."""
    if _PART.sub("", text) or not text:
        raise ValueError(f"{text!r} is no duration such as 120s, 1m30s or 500ms")
    return sum(float(number) * _SECONDS[unit] for number, unit in _PART.findall(text))
