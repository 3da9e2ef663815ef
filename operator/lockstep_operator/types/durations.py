"""Durations such as 120s, 1m30s or 500ms, as the CRD admits them.

Not by `durationpy`: it also takes negative ones, days and years, and text between the parts.
"""

from __future__ import annotations

import re
from typing import Final

_PART: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h)")
_SECONDS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def duration(text: str) -> float:
    """In seconds. Raises ValueError."""
    if _PART.sub("", text) or not text:
        raise ValueError(f"{text!r} is no duration such as 120s, 1m30s or 500ms")
    return sum(float(number) * _SECONDS[unit] for number, unit in _PART.findall(text))
