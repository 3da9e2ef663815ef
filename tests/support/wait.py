"""Waiting: always for a condition, always with a deadline, and never silently."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

T = TypeVar("T")
INTERVAL: Final = 0.25  # seconds between two looks


class DeadlineError(AssertionError):
    """What was waited for did not come; the text says what was seen last and what could explain it."""


def until(what: str, look: Callable[[], T | None], seconds: float, explain: Callable[[], str] = lambda: "") -> T:
    """Look until there is something to see, and return it.

    Args:
        what: completes "waited N s for ...".
        look: returns what was waited for, or None (or False) while it is not there.
        seconds: the deadline.
        explain: called once the deadline has passed; its text becomes part of the error.
    """
    deadline = time.monotonic() + seconds
    while True:
        if seen := look():
            return seen
        if time.monotonic() > deadline:
            raise DeadlineError(f"waited {seconds:g} s for {what}\n{explain()}")
        time.sleep(INTERVAL)
