"""Child processes: started with their names, incarnations and progress records, reaped, signalled by pid.

The spare and the engine are started from nothing. A rank's process is forked from the spare (see `worker.spare`), so
that it costs no import and shares the spare's memory; from the second on from its own loaded spare, if it has left one
(see `worker.loaded_spare`). It becomes a child of this process all the same.
"""

from __future__ import annotations

import asyncio
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

from lockstep_runtime.host import process_init
from lockstep_runtime.host.torch_environment import NCCL_VARIABLES
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.progress_record import Progress, Record, Stage, new_memory
from lockstep_runtime.supervisor.spare import Spare, SpareLostError
from lockstep_runtime.supervisor.stall_tracker import StallTracker
from lockstep_runtime.supervisor.state_machine import ENGINE, Name

logger = logging.getLogger(__name__)
ENGINE_MODULE: Final = "lockstep_runtime.engine"
_HEALTHY_SECONDS: Final = 10.0  # of the spare's and the engine's life
FORK_SECONDS: Final = 5.0  # a spare that takes longer is of no use
_ORPHAN_SECONDS: Final = 1.0
LOADED_FORK_SECONDS: Final = 1.0  # nor is a loaded one: there is another way
_BY_OTHERS: Final = frozenset({signal.SIGKILL, signal.SIGTERM})  # what ends a process in which nothing is wrong
_ONE_THREAD: Final = {"OPENBLAS_NUM_THREADS": "1"}  # numpy's, which is asked for no product: a spare must have none
_PR_SET_CHILD_SUBREAPER: Final = 36  # prctl(2)


class ForkError(OSError):
    """The rank was given no process; the message says why. `spare_is_lost`: it does not answer, another is needed."""

    def __init__(self, message: str, *, spare_is_lost: bool) -> None:
        super().__init__(message)
        self.spare_is_lost = spare_is_lost


@dataclass(frozen=True, slots=True)
class Exit:
    """How a child ended. Exactly one of `code` and `signal` is set. `used`: most resident memory it had, in bytes.
    `words`: why, in the engine's own words."""

    name: Name
    pid: int
    incarnation: str
    healthy: bool
    code: int | None
    signal: int | None
    used: int = 0
    words: str = ""


@dataclass(frozen=True, slots=True)
class Orphan:
    """A process without a name, such as a loaded spare, was killed: by this signal."""

    signal: int


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
    standstill: StallTracker


class Processes:
    """All children of this supervisor."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        own = NCCL_VARIABLES | {process_init.PARENT_VARIABLE: str(os.getpid())}
        self._environment = _ONE_THREAD | dict(environment) | own
        self._by_name: dict[Name, _Process] = {}
        self._caches: dict[int, int] = {}  # descriptors of the memory in which a rank's KV cache outlives its process
        self._last_words = -1  # descriptor of memory for the engine's
        self._spare: Spare | None = None
        self._loaded: dict[int, Spare] = {}  # by rank
        self._ending: dict[int, list[Spare]] = {}  # loaded spares that have been told to
        self._awaited: dict[int, int] = {}  # ranks whose process is being forked, and the signal that awaits it
        self._unknown: dict[int, tuple[int, int]] = {}  # pids that ended meanwhile: one may be such a rank's
        # What the spare forks and leaves behind becomes ours, as it does anyway where this is process 1.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def spawn(self, name: Name, history: bytes = b"") -> int:
        """Start the spare or the engine in a process group of its own; returns its pid.

        `history`: what the engine before said last. It may be long, so the engine reads it from its standard input.

        Raises:
            OSError: the kernel refuses.
        """
        if name == ENGINE:
            pid = self._spawn_engine(history)
        else:
            self.dismiss_spare()
            self._spare = Spare()
            with self._spare.theirs as theirs:
                pid = _spawn("lockstep_runtime.worker", self._environment, theirs.fileno())
        self._by_name[name] = _new(name, pid, secrets.token_hex(8), -1)
        return pid

    def _spawn_engine(self, history: bytes) -> int:
        if self._last_words < 0:
            self._last_words = os.memfd_create("lockstep-last-words")
        os.ftruncate(self._last_words, 0)
        if not history:
            return _spawn(ENGINE_MODULE, self._environment, last_words=self._last_words)
        with os.fdopen(os.memfd_create("lockstep-history"), "r+b", buffering=0) as file:
            file.write(history)
            file.seek(0)
            environment = {**self._environment, process_init.HISTORY_VARIABLE: "stdin"}
            return _spawn(ENGINE_MODULE, environment, file.fileno(), last_words=self._last_words)

    def _words(self) -> str:
        return os.pread(self._last_words, process_init.MOST_LAST_WORDS, 0).decode(errors="replace")

    def spare_socket(self) -> int | None:
        """Readable once there is something for `hear_spare`; None where there is no spare, or none that answers."""
        return self._spare.fileno() if self._spare is not None and self._spare.fileno() >= 0 else None

    def hear_spare(self) -> bool:
        """Whether the spare says that it is warm; it may also have ended."""
        return self._spare is not None and self._spare.is_warm()

    def dismiss_spare(self) -> None:
        """A spare that nobody can speak to any more ends."""
        if self._spare is not None:
            self._spare.end()
            self._spare = None

    def end_loaded_spare(self, rank: int) -> None:
        """The rank's next process loads again; `fork` waits until this one has given back its memory."""
        if loaded := self._loaded.pop(rank, None):
            loaded.end()
            self._ending.setdefault(rank, []).append(loaded)

    def end_loaded_spares(self) -> None:
        for rank in list(self._loaded):
            self.end_loaded_spare(rank)

    async def wait_for_orphans(self) -> None:
        """Until no child is left, named or not: what a loaded spare has forked ahead ends when the spare has."""
        await asyncio.gather(*(self._wait_for_ended(rank) for rank in list(self._ending)))
        deadline = time.monotonic() + _ORPHAN_SECONDS
        with contextlib.suppress(ChildProcessError):
            while time.monotonic() < deadline:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:  # noqa: ASYNC222 - it does not wait
                    await asyncio.sleep(0.002)

    async def fork(self, rank: int) -> int:
        """Have a spare give the rank a process; returns its pid. The machine goes on meanwhile: a signal that is sent
        to the rank before it is there reaches it then.

        Raises:
            ForkError: it has none.
        """
        incarnation, progress = secrets.token_hex(8), -1
        birth = process_init.Birth(rank=rank, incarnation=incarnation)
        self._awaited[rank] = 0
        try:
            await self._wait_for_ended(rank)
            progress, cache = new_memory(f"lockstep-progress-{rank}"), self._cache_of(rank)
            pid = await self._fork_loaded(birth, progress, cache) or await self._fork_spare(birth, progress, cache)
            self._by_name[rank] = _new(rank, pid, incarnation, progress)
        except OSError as error:
            if progress >= 0:
                os.close(progress)
            lost = isinstance(error, SpareLostError)
            raise ForkError(f"rank {rank} was given no process: {error}", spare_is_lost=lost) from error
        finally:
            owed = self._awaited.pop(rank)
        if owed:
            self.signal(rank, owed)
        return pid

    async def _fork_loaded(self, birth: process_init.Birth, *descriptors: int) -> int | None:
        loaded = self._loaded.get(birth.rank)
        if loaded is not None and loaded.is_warm():
            try:
                pid = await loaded.bear(LOADED_FORK_SECONDS, birth, *descriptors)
                logger.info("rank %d has a new process from its loaded spare (pid %d)", birth.rank, pid)
                return pid
            except OSError as error:
                logger.warning("the loaded spare of rank %d gave no process: %s", birth.rank, error)
        self.end_loaded_spare(birth.rank)
        await self._wait_for_ended(birth.rank)
        return None

    async def _fork_spare(self, birth: process_init.Birth, *descriptors: int) -> int:
        if self._spare is None or not self._spare.was_warm:
            raise SpareLostError("there is no spare that is warm")
        self._loaded[birth.rank] = loaded = Spare()
        with loaded.theirs as theirs:
            return await self._spare.bear(FORK_SECONDS, birth, *descriptors, theirs.fileno())

    async def _wait_for_ended(self, rank: int) -> None:
        for spare in self._ending.pop(rank, []):
            await spare.gone()

    def _cache_of(self, rank: int) -> int:
        if rank not in self._caches:
            self._caches[rank] = os.memfd_create(f"lockstep-cache-{rank}")
        return self._caches[rank]

    def records(self) -> list[bus.ProgressRecord]:
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
        elif isinstance(name, int) and name in self._awaited and self._awaited[name] != signal.SIGKILL:
            self._awaited[name] = number

    def incarnation(self, name: Name) -> str:
        process = self._by_name.get(name)
        return process.incarnation if process else ""

    def pids(self) -> dict[Name, int]:
        return {name: process.pid for name, process in self._by_name.items()}

    def reap(self) -> list[Exit | Stop | Orphan]:
        """Every child that has ended, was stopped or goes on. Of a process without a name, such as an orphan that fell
        to PID 1, nothing is said unless it was killed."""
        news: list[Exit | Stop | Orphan] = []
        if not self._awaited:
            news += [told for pid, ended in self._unknown.items() if (told := self._told_of(pid, *ended))]
            self._unknown.clear()
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            except ChildProcessError:
                return news
            if pid == 0:
                return news
            if self._awaited and not (os.WIFSTOPPED(status) or os.WIFCONTINUED(status) or self._named(pid)):
                self._unknown[pid] = status, usage.ru_maxrss
            elif told := self._told_of(pid, status, usage.ru_maxrss):
                news.append(told)

    def _told_of(self, pid: int, status: int, used_kib: int) -> Exit | Stop | Orphan | None:
        process = self._named(pid)
        if process is None:
            return Orphan(os.WTERMSIG(status)) if os.WIFSIGNALED(status) else None
        if os.WIFSTOPPED(status) or os.WIFCONTINUED(status):
            return Stop(process.name, os.WSTOPSIG(status) if os.WIFSTOPPED(status) else 0)
        return self._ended(process, status, used_kib * 1024)

    def _named(self, pid: int) -> _Process | None:
        return next((one for one in self._by_name.values() if one.pid == pid), None)

    def _ended(self, process: _Process, status: int, used: int) -> Exit:
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
            used=used,
            words=self._words() if process.name == ENGINE else "",
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


def _spawn(module: str, environment: Mapping[str, str], stdin: int = 0, *, last_words: int = -1) -> int:
    given = {0: stdin} if stdin else {}
    if last_words >= 0:
        given[process_init.LAST_WORDS] = last_words
    return os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", module],
        environment,
        file_actions=[(os.POSIX_SPAWN_DUP2, ours, theirs) for theirs, ours in given.items()],
        setpgroup=0,
        setsigdef=[signal.SIGTERM, signal.SIGINT, signal.SIGCHLD],
        setsigmask=[],
    )


def _new(name: Name, pid: int, incarnation: str, progress: int) -> _Process:
    now = time.monotonic()
    return _Process(name, pid, incarnation, now, progress, StallTracker(pid, now))


def _told(process: _Process, record: Record, now: float) -> bus.ProgressRecord:
    age, starved = process.standstill.look(record, now)
    return bus.ProgressRecord(
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
