"""Points in time: unix seconds as the RFC 3339 texts of the API server, in whole seconds of UTC."""

from __future__ import annotations

from datetime import UTC, datetime


def parse_rfc3339(text: str) -> float:
    """Unix seconds. Raises ValueError."""
    return datetime.fromisoformat(text).timestamp()


def format_rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def format_micro(seconds: float) -> str:
    """With microseconds, as Events want it."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
