"""How long a process has been waiting for a CPU. A rank that others keep from running is slow; it does not hang."""

from __future__ import annotations

from pathlib import Path
from typing import Final

LOOK_SECONDS: Final = 0.25  # between two looks; a wait that began in between counts from the later one
_NANO: Final = 1e-9


def run_delay(pid: int) -> float:
    """Seconds in all that its main thread was ready to run and did not; 0 where the kernel does not tell (proc(5))."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) * _NANO
    except (OSError, IndexError, ValueError):
        return 0.0


class Waits:
    """Of one process, since its progress record last changed. `look` has to be called often."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._moved = -1.0
        self._before = 0.0

    def look(self, moved: float) -> float:
        """`moved`: when the record last changed, as it says; returns the seconds waited since."""
        now = run_delay(self._pid)
        if moved != self._moved:
            self._moved, self._before = moved, now
        return max(0.0, now - self._before)
