"""How long to wait after failures in a row."""

from __future__ import annotations

import random


def backoff(failures: int, first: float, most: float) -> float:
    """Seconds to wait after so many failures in a row: doubling, with jitter so that not all come back at once."""
    return float(min(most, first * 2 ** min(failures - 1, 20))) * random.uniform(0.5, 1.0)
