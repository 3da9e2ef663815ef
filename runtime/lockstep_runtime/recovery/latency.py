"""Step latency over the last steps."""

from __future__ import annotations

from collections import deque

from lockstep_runtime.protocol.status import Latency


class LatencyWindow:
    """The newest durations, in seconds, and their percentiles."""

    def __init__(self, size: int = 512) -> None:
        self._seconds: deque[float] = deque(maxlen=size)

    def add(self, seconds: float) -> None:
        self._seconds.append(seconds)

    def latency(self) -> Latency:
        """Nearest-rank percentiles, in milliseconds to the microsecond."""
        if not self._seconds:
            return Latency()
        ordered = sorted(self._seconds)
        return Latency(p50_ms=_percentile(ordered, 50), p99_ms=_percentile(ordered, 99))


def _percentile(ordered: list[float], percent: int) -> float:
    rank = -(-len(ordered) * percent // 100)  # ceil: the nearest-rank method
    return round(ordered[max(rank, 1) - 1] * 1000, 3)
