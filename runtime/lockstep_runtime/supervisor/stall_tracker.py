"""How long a rank has not got further, and how much of that it waited for a CPU: kept from running it does not hang."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from lockstep_runtime.protocol.progress_record import Record

LOOK_SECONDS: Final = 0.25  # between two looks; what happened in between counts from the later one
_NANO: Final = 1e-9


def run_delay(pid: int) -> float:
    """Total seconds in which its main thread was runnable and got no CPU; 0 if unknown (proc(5))."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) * _NANO
    except (OSError, IndexError, ValueError):
        return 0.0


class StallTracker:
    """Of one process, whose progress record is looked at often."""

    def __init__(self, pid: int, now: float) -> None:
        self._pid = pid
        self._record: Record | None = None
        self._since, self._before = now, 0.0

    def look(self, record: Record, now: float) -> tuple[float, float]:
        """Seconds since the record was last seen to change, and how many of them the process waited for a CPU."""
        delayed = run_delay(self._pid)
        if record != self._record:
            self._record, self._since, self._before = record, now, delayed
        return max(0.0, now - self._since), max(0.0, delayed - self._before)
