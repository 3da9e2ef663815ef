"""Child processes: started with their names, incarnations and progress records, reaped, signalled by pid.

The zygote, the engine and the fetcher are started from nothing, a rank's process is forked from a zygote (see
`zygote`). It becomes a child of this process all the same.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from lockstep_runtime.host import process_init
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.progress_record import Stage, new_memory
from lockstep_runtime.supervisor.exits import Exit, Orphan, Stop, Waited, wait_all, wait_for_none
from lockstep_runtime.supervisor.progress_reader import ProgressReader
from lockstep_runtime.supervisor.spawn import child_environment, spawn_engine, spawn_fetcher, spawn_zygote
from lockstep_runtime.supervisor.state_machine import ENGINE, FETCHER, Name
from lockstep_runtime.zygote.client import ZygoteLostError
from lockstep_runtime.zygote.messages import ForkRequest
from lockstep_runtime.zygote.pool import ZygotePool

_HEALTHY_SECONDS: Final = 10.0  # that the zygote or the engine has lived
_ORPHAN_SECONDS: Final = 1.0
_PR_SET_CHILD_SUBREAPER: Final = 36  # prctl(2)


class ForkError(OSError):
    """The rank has no process; the message has the reason. `zygote_is_lost`: it doesn't reply, another is needed."""

    def __init__(self, message: str, *, zygote_is_lost: bool) -> None:
        super().__init__(message)
        self.zygote_is_lost = zygote_is_lost


@dataclass(frozen=True, slots=True)
class _Process:
    name: Name
    pid: int
    incarnation: str
    started: float
    progress: ProgressReader | None = None  # a rank's

    def close(self) -> bool:
        """It has ended; returns whether it was healthy."""
        if self.progress is None:
            return time.monotonic() - self.started > _HEALTHY_SECONDS
        stage = self.progress.read().stage
        self.progress.close()
        return stage is Stage.LOADED


class Processes:
    """All children of this supervisor."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = child_environment(environment)
        self._by_name: dict[Name, _Process] = {}
        self._caches: dict[int, int] = {}  # descriptors of the memory in which a rank's KV cache outlives its process
        self._message = os.memfd_create("lockstep-termination-message")  # the engine's
        self._forking: dict[int, int] = {}  # ranks whose process is being forked, and the signal that it is owed
        self._unknown: list[Waited] = []  # that ended meanwhile: one may be such a rank's
        self.zygotes = ZygotePool()
        # What a zygote forks and leaves behind becomes ours, as it does anyway where this is process 1.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def spawn(self, name: Name, given: bytes = b"") -> int:
        """Start the zygote, the engine or the fetcher; returns its pid. `given`: what the engine before reported last,
        or the fetcher's order.

        Raises:
            OSError: the kernel refuses.
        """
        if name == ENGINE:
            os.ftruncate(self._message, 0)
            pid = spawn_engine(self._environment, given, self._message)
        elif name == FETCHER:
            pid = spawn_fetcher(self._environment, given)
        else:
            with self.zygotes.renew().theirs as requests:
                pid = spawn_zygote(self._environment, requests.fileno())
        self._by_name[name] = _Process(name, pid, secrets.token_hex(8), time.monotonic())
        return pid

    async def fork(self, rank: int) -> int:
        """Have a zygote fork a process for the rank; returns its pid. A signal that is sent to the rank meanwhile
        reaches the process once it is there.

        Raises:
            ForkError: there is none.
        """
        incarnation, progress = secrets.token_hex(8), -1
        self._forking[rank] = 0
        try:
            progress, cache = new_memory(f"lockstep-progress-{rank}"), self._cache_of(rank)
            request = ForkRequest(rank=rank, incarnation=incarnation, progress=progress, cache=cache)
            pid = await self.zygotes.fork(request)
            now = time.monotonic()
            self._by_name[rank] = _Process(rank, pid, incarnation, now, ProgressReader(progress, pid, now))
        except OSError as error:
            if progress >= 0:
                os.close(progress)
            lost = isinstance(error, ZygoteLostError)
            raise ForkError(f"rank {rank} was given no process: {error}", zygote_is_lost=lost) from error
        finally:
            owed = self._forking.pop(rank)
        if owed:
            self.signal(rank, owed)
        return pid

    def _cache_of(self, rank: int) -> int:
        if rank not in self._caches:
            self._caches[rank] = os.memfd_create(f"lockstep-cache-{rank}")
        return self._caches[rank]

    def signal(self, name: Name, number: int) -> None:
        process = self._by_name.get(name)
        if process is not None:
            os.kill(process.pid, number)  # not reaped yet, so the pid is still its own
        elif isinstance(name, int) and name in self._forking and self._forking[name] != signal.SIGKILL:
            self._forking[name] = number

    def incarnation(self, name: Name) -> str:
        process = self._by_name.get(name)
        return process.incarnation if process else ""

    def pids(self) -> dict[Name, int]:
        return {name: process.pid for name, process in self._by_name.items()}

    def records(self) -> list[bus.ProgressRecord]:
        """How far every worker has come, whether it answers or not."""
        now = time.monotonic()
        return [reader.report(int(one.name), one.incarnation, now) for one, reader in self._ranks()]

    def look_at_records(self) -> None:
        """So that `records` can say since when a rank has not got further."""
        now = time.monotonic()
        for _, reader in self._ranks():
            reader.look(now)

    def _ranks(self) -> list[tuple[_Process, ProgressReader]]:
        return [(one, one.progress) for one in self._by_name.values() if one.progress is not None]

    def reap(self) -> list[Exit | Stop | Orphan]:
        """Every child that has ended, was stopped or continued. A process without a name, such as an orphan that fell
        to PID 1, is included only if it was killed."""
        found, self._unknown = [*self._unknown, *wait_all()], []
        news: list[Exit | Stop | Orphan] = []
        for waited in found:
            process = next((one for one in self._by_name.values() if one.pid == waited.pid), None)
            if process is not None:
                news.append(self._on_named(process, waited))
            elif self._forking and waited.stopped_by is None:
                self._unknown.append(waited)
            elif waited.signal is not None:
                news.append(Orphan(waited.signal))
        return news

    def _on_named(self, process: _Process, waited: Waited) -> Exit | Stop:
        if waited.stopped_by is not None:
            return Stop(process.name, waited.stopped_by)
        name = process.name
        del self._by_name[name]
        healthy = process.close()
        if isinstance(name, int):
            if waited.signal and not waited.was_killed and name in self._caches:
                os.close(self._caches.pop(name))  # a process that crashed may have written anywhere
            if not (waited.was_killed and healthy):
                self.zygotes.end_loaded(name)  # the cause may lie in what it was forked from
        message = self._termination_message() if name == ENGINE else ""
        return Exit(name, waited.pid, process.incarnation, healthy, waited.code, waited.signal, waited.used, message)

    def _termination_message(self) -> str:
        return os.pread(self._message, process_init.MAX_TERMINATION_MESSAGE, 0).decode(errors="replace")

    async def end_orphans(self) -> None:
        """Until no child is left, named or not: what a loaded zygote has forked ahead ends when the zygote has."""
        await self.zygotes.end_all_loaded()
        await wait_for_none(_ORPHAN_SECONDS)
