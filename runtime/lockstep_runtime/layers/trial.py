"""A kernel is tried on something small before it is used: what it says of itself, or of the machine, proves nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

DIFFERS: Final = "its result differs from the plain one's"
REASON_CHARACTERS: Final = 200  # torch names every backend there is


def failure_of(attempt: Callable[[], str | None]) -> str | None:
    """What is wrong with a kernel, as the attempt tells it; whatever a kernel raises, it is not used."""
    try:
        return attempt()
    except Exception as error:
        return reason(error)


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:REASON_CHARACTERS]}"
