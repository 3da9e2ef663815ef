"""One download at a time of all processes and pods that share a cache: a lock on a file in it, and beside that the
holder's progress, which those who wait report as their own.

A lock of the kernel's (flock) ends with its holder, however it ends, so nobody waits for one that is gone, and no clock
is compared between nodes; NFS carries it between nodes, too. Where a file system only pretends to lock, two may
download the same: each checks what it has before it is published, so nothing worse follows.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from lockstep_runtime.sources.hub_cache import write_atomically

POLL_SECONDS: Final = 0.2
TELL_SECONDS: Final = 0.5  # between two writes of the progress
FRESH_SECONDS: Final = 30.0  # the age up to which another's progress is believed


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """Of fetching a model, in bytes. `moved`: received, or read to be checked; it rises as long as anything happens."""

    done: int = 0
    total: int = 0
    moved: int = 0


class Lease:
    """Held: nobody else downloads into this cache."""

    def __init__(self, lock: Path) -> None:
        self._file = lock.with_suffix(".progress")
        self._told = 0.0

    def tell(self, progress: Progress) -> None:
        """Best effort."""
        now = time.monotonic()
        if now - self._told >= TELL_SECONDS:
            self._told = now
            with contextlib.suppress(OSError):
                write_atomically(self._file, msgspec.json.encode(progress))


@contextlib.contextmanager
def leased(lock: Path, waiting: Callable[[Progress], None]) -> Iterator[Lease]:
    """Wait for the lock and hold it. `waiting` is called again and again meanwhile, with the holder's progress.

    Raises:
        OSError: the cache may not be written.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
    lease = Lease(lock)
    try:
        while not _try(descriptor):
            if progress := _read(lock.with_suffix(".progress")):
                waiting(progress)
            time.sleep(POLL_SECONDS)
        yield lease
    finally:
        os.close(descriptor)


def _try(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(path: Path) -> Progress | None:
    """None: nobody has said anything lately."""
    try:
        if time.time() - path.stat().st_mtime > FRESH_SECONDS:
            return None
        return msgspec.json.decode(path.read_bytes(), type=Progress)
    except (OSError, msgspec.MsgspecError):
        return None
