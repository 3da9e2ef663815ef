"""Points in time, as the API server writes them (RFC 3339, whole seconds, UTC) and as unix seconds."""

from __future__ import annotations

from datetime import UTC, datetime


def unix(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def text(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def micro(seconds: float) -> str:
    """With microseconds, as Events want it."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
