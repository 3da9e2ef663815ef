"""Collectives between the ranks of one machine, over a file in shared memory.

A rank copies its tensor into its slot, raises its counter, waits until every other rank's counter has come as far, and
then sums all slots in rank order: the same order, hence the same bits, on every rank. Slots come in two sets that take
turns. A rank enters exchange s + 2, which reuses the set of s, only after it has seen every counter at s + 1, and a
rank's counter reaches s + 1 only after it has read the slots of s: so nothing is overwritten that is still being read.

Counters and data are plain stores, so this relies on stores becoming visible in their order (x86-64 does that).

A decode step of a small model makes 57 exchanges, so a rank spins for its peers, but not for long: on a busy machine
the peer may be waiting for this very core. After that it sleeps in small steps. It never calls sched_yield, after which
the scheduler lets every other process go first. With fewer cores than ranks it sleeps at once.
"""

from __future__ import annotations

import functools
import mmap
import os
import platform
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from lockstep_runtime.distributed.errors import CommunicatorAborted, CommunicatorError, check_proof
from lockstep_runtime.distributed.host_collectives import PIECE_BYTES, HostCommunicator, Slots
from lockstep_runtime.host.cgroup import cpus
from lockstep_runtime.host.memory import file_bytes, has_room, mebibytes
from lockstep_runtime.host.shm_files import SHARED_MEMORY, owner, owner_of

SCHEME: Final = "shm://"
FOLDER: Final = SHARED_MEMORY
COUNTERS_BYTES: Final = 4096
CACHE_LINE_WORDS: Final = 8  # a counter per line: no rank's store takes another's line away
ABORTED: Final = 0  # the word that says so; rank r's counter is word (1 + r) * CACHE_LINE_WORDS
MAX_RANKS: Final = COUNTERS_BYTES // 8 // CACHE_LINE_WORDS - 1
SPIN_SECONDS: Final = 200e-6  # longer than ranks of one machine are usually apart
LOOKS: Final = 400  # between two looks at the clock, about 30 µs
SLEEP_SECONDS: Final = 50e-6


def is_supported() -> bool:
    return platform.machine() == "x86_64" and FOLDER.is_dir()


def exchange_bytes(size: int) -> int:
    """What the ranks of a pod need of shared memory for one communicator."""
    return COUNTERS_BYTES + 2 * size * PIECE_BYTES


class SharedFile:
    """The meeting place: rank 0 makes it, every rank maps it, and it is unlinked when all have.

    Raises:
        CommunicatorError: there is no room for it.
    """

    keeps = True

    def __init__(self, size: int) -> None:
        path, needed = _new_path(), exchange_bytes(size)
        if not has_room(FOLDER, needed):
            raise CommunicatorError(
                f"{FOLDER} has no room for the exchange of {size} ranks: it takes {mebibytes(needed)}, and "
                f"{mebibytes(file_bytes(FOLDER))} are left; give the pod or container more of it"
            )
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, needed)
        except OSError as error:
            path.unlink()
            raise CommunicatorError(f"{FOLDER} has no room for the ranks' exchange: {error}") from error
        finally:
            os.close(descriptor)
        self.path = path
        self.address = f"{SCHEME}{path}"

    def close(self) -> None:
        self.path.unlink(missing_ok=True)


class SharedMemoryCommunicator(HostCommunicator):
    """One rank's end. All methods but `release` belong to one thread."""

    def __init__(
        self, address: str, rank: int, size: int, timeout: float, cancelled: Callable[[], bool] = lambda: False
    ) -> None:
        """
        Raises:
            CommunicatorError: no such meeting place, not everyone was there in time, or it was cancelled meanwhile.
        """
        if size > MAX_RANKS:
            raise CommunicatorError(f"shared memory serves {MAX_RANKS} ranks at most, not {size}")
        super().__init__(rank, size)
        self._map = _map_file(Path(address.removeprefix(SCHEME)), exchange_bytes(size))
        self._words = memoryview(self._map)[:COUNTERS_BYTES].cast("q")
        self._mine = (1 + rank) * CACHE_LINE_WORDS
        self._others = [(1 + other) * CACHE_LINE_WORDS for other in range(size) if other != rank]
        self._sequence = 0
        memory = torch.frombuffer(self._map, dtype=torch.uint8, offset=COUNTERS_BYTES).view(2, size, PIECE_BYTES)
        self._slots = [Slots(list(memories)) for memories in memory]
        self._spin = _spin_seconds(size)
        self._deadline: float | None = time.monotonic() + timeout
        self._cancelled = cancelled
        self._meet()
        if rank == 0:  # everyone has mapped it: nothing stays behind, however the ranks end
            Path(address.removeprefix(SCHEME)).unlink(missing_ok=True)
        self._deadline = None

    def check(self) -> None:
        if self._words[ABORTED]:
            raise CommunicatorAborted("the communicator was aborted")

    def release(self) -> None:
        """Release every rank, whichever collective it is in; from any thread, any number of times."""
        self._words[ABORTED] = 1

    def close(self) -> None:
        """The mapping goes with the object: views of it may still be alive."""
        self.release()

    def _meet(self) -> None:
        check_proof(self.all_reduce(torch.ones(1)).item(), self.size)

    def _exchange(self, piece: Tensor, *, for_rank_0: bool = False) -> tuple[Tensor, ...]:
        words = self._words
        if words[ABORTED]:
            raise CommunicatorAborted("the communicator was aborted")
        self._sequence = sequence = self._sequence + 1
        slots = self._slots[sequence & 1].like(piece)
        slots[self.rank].copy_(piece)
        words[self._mine] = sequence
        for other in self._others:
            if words[other] < sequence:
                self._wait(other, sequence)
        return slots

    def _wait(self, other: int, sequence: int) -> None:
        words = self._words
        started = time.monotonic()
        while True:
            for _ in range(LOOKS if self._spin else 1):
                if words[other] >= sequence:
                    self.on_wait(None)
                    return
            now = time.monotonic()
            if words[ABORTED]:
                raise CommunicatorAborted("the communicator was aborted in a collective")
            if self._deadline is not None:
                self._check_meeting(other, now, self._deadline)
            if now - started >= self._spin:
                self._sleep(other, sequence)

    def _sleep(self, other: int, sequence: int) -> None:
        """Until the other is there, or there is reason to look at the clock and the abort flag again."""
        self.on_wait(other // CACHE_LINE_WORDS - 1)
        words = self._words
        for _ in range(20):
            time.sleep(SLEEP_SECONDS)
            if words[other] >= sequence:
                return

    def _check_meeting(self, other: int, now: float, deadline: float) -> None:
        if self._cancelled():
            raise CommunicatorAborted("the meeting was called off")
        if now > deadline:
            raise CommunicatorError(f"rank {other // CACHE_LINE_WORDS - 1} did not join in time")


@functools.cache
def _spin_seconds(size: int) -> float:
    """Asked for once: who joins waits for it, and a quota that is changed later changes no thread count either."""
    return SPIN_SECONDS if size <= cpus() else 0.0


def _new_path() -> Path:
    """Named for its supervisor, if any. What an epoch left whose rank 0 was killed before all had come, goes."""
    supervisor = owner(os.environ)
    if supervisor is not None:
        for stale in FOLDER.glob(f"lockstep-group-{supervisor}-*"):
            stale.unlink(missing_ok=True)
    return FOLDER / f"lockstep-group-{supervisor or owner_of(os.getpid())}-{secrets.token_hex(8)}"


def _map_file(path: Path, size: int) -> mmap.mmap:
    if path.parent != FOLDER:
        raise CommunicatorError(f"{path} is not in {FOLDER}")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise CommunicatorError(f"the ranks' meeting place {path} can't be opened: {error}") from error
    try:
        if os.fstat(descriptor).st_size != size:
            raise CommunicatorError(f"{path} has {os.fstat(descriptor).st_size} bytes, not the {size} of this group")
        return mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)
