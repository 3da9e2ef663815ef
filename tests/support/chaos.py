"""A served group to do harm to, requests in flight, and what must be true afterwards."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from tests.support.faults import inject
from tests.support.serve import AS_JSON, TINY_CHAT, Served, is_running, served
from tests.support.stream import Answer, Stream, answers, start

from lockstep_runtime.host.shm_files import FOLDER_VARIABLE, SHARED_MEMORY, owner_of
from lockstep_runtime.protocol.chaos import CollectivePoint, FaultPhase, Injection
from lockstep_runtime.protocol.status import Fault, FaultRecord, GroupState, GroupStatus
from lockstep_runtime.recovery.log_trail import TrailPhase
from lockstep_runtime.recovery.policy import RESPAWNS

MAX_TOKENS: Final = 160  # so many that a fault meets the stream while it runs, however fast the machine
NEXT_TOKENS: Final = 16  # of the requests after it
Requests = Callable[[Served, int], list[Stream]]  # (group, tokens of each) -> what is in flight
STREAM_SECONDS: Final = 180.0
REPAIR: Final = {"detect", "abort", "respawn", "rebuild", "verify", "firstToken"}  # its phases
CELLS_PER_GROUP: Final = 8  # and most of its respawns: so that no cell meets a group whose budgets others have spent


@dataclass(frozen=True, slots=True)
class Cell:
    """One fault at one moment to one rank of a group of `size`."""

    kind: Injection
    at: CollectivePoint
    phase: FaultPhase
    rank: int
    size: int

    @property
    def name(self) -> str:
        where = f" {self.at} a collective" if self.kind is Injection.HANG else ""
        return f"{self.kind}{where}, {self.phase}, rank {self.rank} of {self.size}"

    def provoke(self, serve: Served, requests: Requests | None = None) -> list[Stream]:
        """Let the fault happen while requests are in flight; an idle group gets them right afterwards."""
        begin = requests or read
        if self.phase is FaultPhase.IDLE:
            inject(serve, self.kind, self.rank, phase=FaultPhase.IDLE)
            return begin(serve, MAX_TOKENS)
        if self.phase in (FaultPhase.PREFILL, FaultPhase.JOINING, FaultPhase.LOADING):
            inject(serve, self.kind, self.rank, phase=self.phase, at=self.at)
        streams = begin(serve, MAX_TOKENS)
        if self.phase is not FaultPhase.PREFILL:
            serve.until(lambda: all(stream.pieces > 3 or stream.error for stream in streams), "the streams have begun")
        if self.phase is FaultPhase.DECODE:
            inject(serve, self.kind, self.rank, phase=FaultPhase.DECODE, at=self.at)
        if self.phase is FaultPhase.JOINING:  # another rank is lost: the communicator has to be made anew
            inject(serve, Injection.SIGKILL, (self.rank + 1) % self.size)
        if self.phase is FaultPhase.LOADING:  # the rank's next process meets the fault
            inject(serve, Injection.SIGKILL, self.rank)
        return streams

    @property
    def expected(self) -> tuple[frozenset[Fault], frozenset[int | None]]:
        """The names that the fault may have, and whom it may be laid on."""
        if self.phase is FaultPhase.LOADING:
            return frozenset({Fault.RANK_LOST}), frozenset({self.rank})
        if self.phase is FaultPhase.IDLE and self.kind in (Injection.RAISE, Injection.MEMORY):
            return frozenset({Fault.RANK_LOST}), frozenset({self.rank})  # outside of any step it ends the process
        if self.at is CollectivePoint.INSIDE:
            return frozenset({Fault.HANG}), frozenset({self.rank})
        unseen = self.kind in (Injection.NAN, Injection.INPUT, Injection.ACTIVATION) and self.size == 2
        return NAMES[self.kind], frozenset({self.rank, *([None] if unseen or self.kind is Injection.NAN else [])})

    @property
    def spoils_caches(self) -> bool:
        """Whether what was computed before can't be relied on."""
        return self.kind is Injection.SIGSEGV

    @property
    def words(self) -> str:
        """What the fault's sentence must have in it."""
        if self.kind is Injection.HANG and self.phase in (FaultPhase.DECODE, FaultPhase.PREFILL):
            return {
                CollectivePoint.BEFORE: f"rank {self.rank} stopped before ",
                CollectivePoint.INSIDE: f"the others wait for rank {self.rank}",
                CollectivePoint.AFTER: "",
            }[self.at]
        killers = (Injection.SIGKILL, Injection.SIGSEGV)
        return f"was killed by {self.kind.upper()}" if self.kind in killers and self.phase is FaultPhase.DECODE else ""


NAMES: Final = {
    Injection.RAISE: frozenset({Fault.STEP_FAILED}),
    Injection.HANG: frozenset({Fault.HANG}),
    Injection.SIGKILL: frozenset({Fault.RANK_LOST}),
    Injection.SIGSTOP: frozenset({Fault.HANG}),
    Injection.SIGSEGV: frozenset({Fault.RANK_LOST}),
    Injection.EXIT: frozenset({Fault.RANK_LOST}),
    Injection.MEMORY: frozenset({Fault.STEP_FAILED}),
    Injection.NAN: frozenset({Fault.NON_FINITE}),
    Injection.INPUT: frozenset({Fault.DESYNC}),
    Injection.ACTIVATION: frozenset({Fault.DESYNC}),
    Injection.CLOSE_BUS: frozenset({Fault.RANK_LOST}),
}
PHASES: Final = (FaultPhase.DECODE, FaultPhase.PREFILL, FaultPhase.IDLE, FaultPhase.JOINING, FaultPhase.LOADING)


def as_parameters(cells: Iterable[Cell], in_third: Callable[[Cell], bool]) -> list[object]:
    """Of a test; those of `make test`'s third are marked."""
    return [pytest.param(cell, id=cell.name, marks=[pytest.mark.third] if in_third(cell) else []) for cell in cells]


def cells() -> list[Cell]:
    """The matrix: every kind, phase and rank with two ranks, and a third of that with four."""
    kinds = [
        (kind, at) for kind in NAMES for at in CollectivePoint if at is CollectivePoint.BEFORE or kind is Injection.HANG
    ]
    pairs = [
        Cell(kind, at, phase, rank, 2)
        for kind, at in kinds
        for phase in PHASES
        for rank in (0, 1)
        if at is CollectivePoint.BEFORE
        or phase in (FaultPhase.DECODE, FaultPhase.PREFILL)  # elsewhere there is no collective
    ]
    fours = [Cell(cell.kind, cell.at, cell.phase, 2 * cell.rank, 4) for cell in pairs if _turn(cell) == 1]
    return pairs + fours


def is_in_third(cell: Cell) -> bool:
    """The fixed third that `make test` runs: every kind and every phase is in it, with either rank."""
    return cell.size == 2 and _turn(cell) == 0


def _turn(cell: Cell) -> int:
    kinds = list(NAMES)
    return (kinds.index(cell.kind) + list(CollectivePoint).index(cell.at) + PHASES.index(cell.phase) + cell.rank) % 3


def read(serve: Served, tokens: int = MAX_TOKENS) -> list[Stream]:
    return start(serve.api, "tiny-chat", tokens, STREAM_SECONDS)


class Arena:
    """Groups to do harm to, one after the other: a new one when the last can't be used for another cell."""

    def __init__(
        self,
        directory: Path,
        size: int,
        *arguments: str,
        model: Path = TINY_CHAT,
        requests: Requests = read,
        **environment: str,
    ) -> None:
        """`arguments`: more of `lockstep serve`."""
        self._directory, self._size, self._arguments = directory, size, arguments
        self._model, self.requests = model, requests
        self._environment = {FOLDER_VARIABLE: str(directory / "shm"), **AS_JSON, **environment}
        (directory / "shm").mkdir()
        self._stack = contextlib.ExitStack()
        self._group: Served | None = None
        self._cells = 0
        self.undisturbed: list[Answer] = []

    @contextlib.contextmanager
    def group(self) -> Iterator[Served]:
        """A group that is ready; it is kept for the next cell when this one has left it well."""
        serve, self._group = self._group, None
        if serve is None:
            serve = self._start()
        self._cells += 1
        yield serve
        respawns = sum(rank.respawns for rank in serve.status().ranks)
        if self._cells < CELLS_PER_GROUP and respawns < RESPAWNS - 3 and serve.is_ready():
            self._group = serve
        else:
            self._end(serve)

    def close(self) -> None:
        """End what still runs; it must leave nothing behind."""
        serve, self._group = self._group, None
        if serve is not None:
            self._end(serve)
        self._stack.close()

    def _start(self) -> Served:
        self._stack.close()  # of a cell that failed
        self._cells = 0
        serve = self._stack.enter_context(
            served(
                self._directory,
                *("--tensor-parallel-size", str(self._size), "--dtype", "float32", "--threads-per-rank", "1"),
                *("--kv-cache-memory", "64Mi", "--allow-faults", *self._arguments),
                model=self._model,
                environment=self._environment,
            )
        )
        serve.ready()
        self.undisturbed = answers(self.requests(serve, MAX_TOKENS))
        whole = [one.text and one.finish == "length" and one.done and not one.error for one in self.undisturbed]
        assert all(whole), self.undisturbed
        return serve

    def _end(self, serve: Served) -> None:
        owner, children = owner_of(serve.process.pid), serve.child_pids()
        assert serve.end() == 0, serve.log.read_text()
        assert not [pid for pid in children if is_running(pid)]
        folders = (self._directory / "shm", SHARED_MEMORY)
        assert [path.name for folder in folders for path in folder.iterdir() if str(owner) in path.name] == []
        self._stack.close()


def survive(arena: Arena, cell: Cell) -> None:
    """The whole of a cell: harm, and everything that must hold afterwards."""
    with arena.group() as serve:
        status = serve.status()
        before, pids = {record.id for record in status.faults}, ranks_of(status)
        assert answers(cell.provoke(serve, arena.requests)) == arena.undisturbed, serve.log.read_text()
        faults, ranks = cell.expected

        def named() -> bool:
            records = [record for record in serve.status().faults if record.id not in before]
            return any(record.fault in faults and record.rank in ranks for record in records)

        serve.until(named, f"a fault {sorted(faults)} of rank {ranks}; told are {tell(serve, before)}", 20)
        healed(serve)
        for after, whole in zip(answers(arena.requests(serve, NEXT_TOKENS)), arena.undisturbed, strict=True):
            assert after.text, f"{after}\n{serve.log.read_text()}"
            assert whole.text.startswith(after.text), serve.log.read_text()
        print(f"{cell.name}: {tell(serve, before)}")
        told = [record for record in serve.status().faults if record.id not in before]
        if len(told) == 1:
            check_told(serve, cell, told[0], pids)


def check_told(serve: Served, cell: Cell, record: FaultRecord, pids: dict[int, int]) -> None:
    """What a person reads of a fault that was the only one; and that no process went but those of suspects."""
    assert record.phases.keys() >= REPAIR - ({"firstToken"} if cell.phase is FaultPhase.IDLE else set())
    lines = [line for line in serve.records() if line.get("fault") == record.id and "epoch" in line]
    assert [*dict.fromkeys(line["phase"] for line in lines)] == [
        TrailPhase.WATCHDOG, TrailPhase.ABORT, TrailPhase.RESPAWN, TrailPhase.REBUILD, TrailPhase.VERIFY,
        TrailPhase.RESUMED,
    ]  # fmt: skip
    assert lines[-1]["kept"] is not cell.spoils_caches
    assert lines[0].get("rank") in (record.rank, None)
    assert cell.words in record.message
    respawned = {rank for rank, pid in ranks_of(serve.status()).items() if pid != pids[rank]}
    if record.rung == "Rebuild":
        assert respawned == set()
    else:
        expected = set(pids) if record.rank is None else {record.rank}
        assert respawned == expected, serve.log.read_text()


def healed(serve: Served) -> None:
    def well() -> bool:
        status = serve.status()
        repaired = all(record.recovered_at is not None for record in status.faults)
        return status.state is GroupState.READY and repaired

    serve.until(well, "the group is Ready and every fault is repaired")


def outlive_a_killed_rank_0(serve: Served, begin: Callable[[], list[Stream]], undisturbed: list[Answer]) -> None:
    """Streams that have begun when rank 0 is killed answer as without."""
    before = serve.status().recoveries
    streams = begin()
    serve.until(lambda: all(one.pieces > 5 for one in streams), "the streams have begun")
    os.kill(serve.pid_of("rank=0"), signal.SIGKILL)
    assert [one.wait() for one in streams] == undisturbed
    serve.until(lambda: serve.status().recoveries > before, "the repair is told")


def tell(serve: Served, before: set[int]) -> list[str]:
    """The faults since, each in a line."""
    return [
        f"{record.fault} of rank {record.rank} → {record.rung} ({record.message}) {record.phases}"
        for record in serve.status().faults
        if record.id not in before
    ]


def wait_for(condition: Callable[[], bool], what: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)


def ranks_of(status: GroupStatus) -> dict[int, int]:
    """Rank to pid."""
    return {rank.rank: rank.pid for rank in status.ranks}
