"""Reconnecting to the engine: for the supervisor's end of the bus and the worker's."""

from __future__ import annotations

import random
from typing import Final

CONNECT_SECONDS: Final = 5.0  # for one attempt
FIRST_SECONDS: Final = 0.05  # between two attempts
MOST_SECONDS: Final = 1.0
FACTOR: Final = 1.5


class Pauses:
    """Between attempts, each longer than the one before, and never the same in two processes."""

    def __init__(self) -> None:
        self._next = FIRST_SECONDS

    def next(self) -> float:
        """Seconds to wait now."""
        pause = self._next * random.uniform(0.5, 1.0)
        self._next = min(self._next * FACTOR, MOST_SECONDS)
        return pause

    def start_over(self) -> None:
        """There was a connection."""
        self._next = FIRST_SECONDS
