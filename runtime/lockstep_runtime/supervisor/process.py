"""Child processes: started with their names, incarnations and progress records, reaped, signalled by pid.

The spare and the engine are started from nothing. A rank's process is forked from the spare (see `worker.spare`), so
that it costs no import and shares the spare's memory; from the second on from its own loaded spare, if it has left one
(see `worker.loaded_spare`). It becomes a child of this process all the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from lockstep_runtime import child, wire
from lockstep_runtime.progress import Progress, Record, Stage, new_memory
from lockstep_runtime.supervisor.machine import ENGINE, Name
from lockstep_runtime.supervisor.spare import Spare
from lockstep_runtime.supervisor.starvation import Standstill

logger = logging.getLogger(__name__)
_HEALTHY_SECONDS: Final = 10.0  # of the spare's and the engine's life
FORK_SECONDS: Final = 5.0  # a spare that takes longer is of no use
_ORPHAN_SECONDS: Final = 1.0
LOADED_FORK_SECONDS: Final = 1.0  # nor is a loaded one: there is another way
_BY_OTHERS: Final = frozenset({signal.SIGKILL, signal.SIGTERM})  # what ends a process in which nothing is wrong
_ONE_THREAD: Final = {"OPENBLAS_NUM_THREADS": "1"}  # numpy's, which is asked for no product: a spare must have none
_PR_SET_CHILD_SUBREAPER: Final = 36  # prctl(2)


class ForkError(Exception):
    """The spare is of no use; the message says why."""


@dataclass(frozen=True, slots=True)
class Exit:
    """How a child ended. Exactly one of `code` and `signal` is set."""

    name: Name
    pid: int
    incarnation: str
    healthy: bool
    code: int | None
    signal: int | None


@dataclass(frozen=True, slots=True)
class Stop:
    """A child was stopped by a signal; 0: it goes on."""

    name: Name
    signal: int


@dataclass(frozen=True, slots=True)
class _Process:
    name: Name
    pid: int
    incarnation: str
    started: float
    progress: int  # a rank's descriptor; -1 for others
    standstill: Standstill


class Processes:
    """All children of this supervisor."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = _ONE_THREAD | dict(environment) | {child.PARENT_VARIABLE: str(os.getpid())}
        self._by_name: dict[Name, _Process] = {}
        self._caches: dict[int, int] = {}  # descriptors of the memory in which a rank's KV cache outlives its process
        self._spare: Spare | None = None
        self._loaded: dict[int, Spare] = {}  # by rank
        # What the spare forks and leaves behind becomes ours, as it does anyway where this is process 1.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def spawn(self, name: Name, extra: Mapping[str, str] | None = None) -> int:
        """Start the child in a process group of its own; returns its pid.

        Raises:
            ForkError: the spare did not give the rank a process.
        """
        incarnation = secrets.token_hex(8)
        if isinstance(name, int):
            return self._fork(name, incarnation)
        environment = self._environment | dict(extra or {})
        pid = _spawn("lockstep_runtime.engine", environment) if name == ENGINE else self._spawn_spare(environment)
        self._by_name[name] = _new(name, pid, incarnation, -1)
        return pid

    def _spawn_spare(self, environment: Mapping[str, str]) -> int:
        self._spare = Spare()
        with self._spare.theirs as theirs:
            return _spawn("lockstep_runtime.worker", environment, stdin=theirs.fileno())

    def spare_socket(self) -> int | None:
        """Readable once there is something for `hear_spare`."""
        return self._spare.fileno() if self._spare is not None else None

    def hear_spare(self) -> bool:
        """Whether the spare says that it is warm; it may also have ended."""
        return self._spare is not None and self._spare.is_warm()

    def dismiss_spare(self) -> None:
        """A spare that nobody can speak to any more ends."""
        if self._spare is not None:
            self._spare.end()
            self._spare = None

    def end_loaded_spare(self, rank: int) -> None:
        """The rank's next process loads again."""
        if loaded := self._loaded.pop(rank, None):
            loaded.end()

    def end_loaded_spares(self) -> None:
        for rank in list(self._loaded):
            self.end_loaded_spare(rank)

    def wait_for_orphans(self) -> None:
        """Until no child is left, named or not: what a loaded spare has forked ahead ends when the spare has."""
        deadline = time.monotonic() + _ORPHAN_SECONDS
        with contextlib.suppress(ChildProcessError):
            while time.monotonic() < deadline:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    time.sleep(0.002)

    def _fork(self, rank: int, incarnation: str) -> int:
        progress, cache = new_memory(f"lockstep-progress-{rank}"), self._cache_of(rank)
        birth = child.Birth(rank=rank, incarnation=incarnation)
        try:
            pid = self._fork_loaded(birth, progress, cache) or self._fork_spare(birth, progress, cache)
        except OSError as error:
            os.close(progress)
            raise ForkError(f"the spare gave rank {rank} no process: {error or type(error).__name__}") from error
        self._by_name[rank] = _new(rank, pid, incarnation, progress)
        return pid

    def _fork_loaded(self, birth: child.Birth, *descriptors: int) -> int | None:
        loaded = self._loaded.get(birth.rank)
        if loaded is not None and loaded.is_warm():
            try:
                pid = loaded.bear(LOADED_FORK_SECONDS, birth, *descriptors)
                logger.info("rank %d has a new process from its loaded spare (pid %d)", birth.rank, pid)
                return pid
            except OSError as error:
                logger.warning("the loaded spare of rank %d gave no process: %s", birth.rank, error)
        self.end_loaded_spare(birth.rank)
        return None

    def _fork_spare(self, birth: child.Birth, *descriptors: int) -> int:
        if self._spare is None:
            raise OSError("there is none")
        self._loaded[birth.rank] = loaded = Spare()
        with loaded.theirs as theirs:
            return self._spare.bear(FORK_SECONDS, birth, *descriptors, theirs.fileno())

    def _cache_of(self, rank: int) -> int:
        if rank not in self._caches:
            self._caches[rank] = os.memfd_create(f"lockstep-cache-{rank}")
        return self._caches[rank]

    def records(self) -> list[wire.ProgressRecord]:
        """How far every worker has come, whether it answers or not."""
        now = time.monotonic()
        return [_told(process, self._record(process), now) for process in self._ranks()]

    def look_at_records(self) -> None:
        """So that `records` can say since when a rank has not got further."""
        now = time.monotonic()
        for process in self._ranks():
            process.standstill.look(self._record(process), now)

    def _ranks(self) -> list[_Process]:
        return [process for process in self._by_name.values() if isinstance(process.name, int)]

    def signal(self, name: Name, number: int) -> None:
        process = self._by_name.get(name)
        if process is not None:
            os.kill(process.pid, number)  # not reaped yet, so the pid is still its own

    def incarnation(self, name: Name) -> str:
        process = self._by_name.get(name)
        return process.incarnation if process else ""

    def pids(self) -> dict[Name, int]:
        return {name: process.pid for name, process in self._by_name.items()}

    def reap(self) -> list[Exit | Stop]:
        """Every child that has ended, was stopped or goes on; as PID 1 also orphans, of which nothing is said."""
        news: list[Exit | Stop] = []
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            except ChildProcessError:
                return news
            if pid == 0:
                return news
            process = next((one for one in self._by_name.values() if one.pid == pid), None)
            if process is None:
                continue
            if os.WIFSTOPPED(status) or os.WIFCONTINUED(status):
                news.append(Stop(process.name, os.WSTOPSIG(status) if os.WIFSTOPPED(status) else 0))
            else:
                news.append(self._ended(process, status))

    def _ended(self, process: _Process, status: int) -> Exit:
        del self._by_name[process.name]
        killed, healthy = os.WIFSIGNALED(status), self._was_healthy(process)
        by_others = killed and os.WTERMSIG(status) in _BY_OTHERS
        if killed and not by_others and process.name in self._caches:
            os.close(self._caches.pop(process.name))  # a process that crashed may have written anywhere
        if isinstance(process.name, int) and not (by_others and healthy):
            self.end_loaded_spare(process.name)  # the cause may lie in what it was forked from
        return Exit(
            name=process.name,
            pid=process.pid,
            incarnation=process.incarnation,
            healthy=healthy,
            code=None if killed else os.WEXITSTATUS(status),
            signal=os.WTERMSIG(status) if killed else None,
        )

    def _was_healthy(self, process: _Process) -> bool:
        if process.progress < 0:
            return time.monotonic() - process.started > _HEALTHY_SECONDS
        stage = self._record(process).stage
        os.close(process.progress)
        return stage is Stage.LOADED

    def _record(self, process: _Process) -> Record:
        progress = Progress(process.progress)
        record = progress.read()
        progress.close()
        return record


def _spawn(module: str, environment: Mapping[str, str], stdin: int = 0) -> int:
    return os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", module],
        environment,
        file_actions=[(os.POSIX_SPAWN_DUP2, stdin, 0)] if stdin else [],
        setpgroup=0,
        setsigdef=[signal.SIGTERM, signal.SIGINT, signal.SIGCHLD],
        setsigmask=[],
    )


def _new(name: Name, pid: int, incarnation: str, progress: int) -> _Process:
    now = time.monotonic()
    return _Process(name, pid, incarnation, now, progress, Standstill(pid, now))


def _told(process: _Process, record: Record, now: float) -> wire.ProgressRecord:
    age, starved = process.standstill.look(record, now)
    return wire.ProgressRecord(
        rank=int(process.name),
        incarnation=process.incarnation,
        epoch=record.epoch,
        step=record.step,
        in_step=record.in_step,
        collective=record.collective,
        inside=record.inside,
        place=record.place,
        awaited=record.awaited,
        age=age,
        starved=starved,
    )
