"""How long to wait after failures in a row."""

from __future__ import annotations

import random


def exponential(failures: int, first: float, most: float) -> float:
    """Seconds to wait after so many failures in a row: doubling."""
    return float(min(most, first * 2 ** min(failures - 1, 30)))


def backoff(failures: int, first: float, most: float) -> float:
    """The same, with jitter so that not all come back at once."""
    return exponential(failures, first, most) * random.uniform(0.5, 1.0)
