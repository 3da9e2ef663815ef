"""Reports this process' progress while it loads: a download, a disk, a checksum.

The kernel counts what a process reads and writes, so no library is involved; a load that hangs moves nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final

BEAT_SECONDS: Final = 1.0
LEAST_BYTES: Final = 256 * 1024  # less than this is housekeeping, the beat's own messages included
_COUNTERS: Final = Path("/proc/self/io")


class Heartbeat:
    """While it is entered, `beat(bytes moved in all)` is called every second in which so much was moved."""

    def __init__(
        self, beat: Callable[[int], None], seconds: float = BEAT_SECONDS, count: Callable[[], int] | None = None
    ) -> None:
        self._beat, self._seconds, self._count = beat, seconds, count or moved_bytes
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nobody else runs when the process is forked afterwards."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        told = begun = self._count()
        while not self._over.wait(self._seconds):
            now = self._count()
            if now - told >= LEAST_BYTES:
                told = now
                self._beat(now - begun)


def moved_bytes() -> int:
    """Read and written by this process so far, from files and sockets that it reads as such; 0 where nobody counts."""
    try:
        lines = _COUNTERS.read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("rchar:", "wchar:")))
