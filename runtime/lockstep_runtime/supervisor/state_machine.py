"""What a supervisor does when something happens: pure. Events and `now` in, actions out.

It keeps one process per rank of its pod, and in the leader pod the engine, until it is asked to end. A dead
worker is started again at once; one that dies before it was loaded, an engine that dies young, or a process that the
kernel refuses to start, waits 1, 2, 4 … 30 s from the second time on.

Every rank's process is forked from a zygote, which has imported what a worker needs: while the pod's is not ready,
ranks wait for it.

A model of a hub is brought by a fetcher, which ends when it has done so. In a member pod it begins once the engine has
said which commit the group loads.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from signal import SIGKILL, SIGTERM
from typing import Final, Literal

Name = int | Literal["engine", "zygote", "fetcher"]  # a worker's name is its rank
ENGINE: Final[Literal["engine"]] = "engine"
ZYGOTE: Final[Literal["zygote"]] = "zygote"
FETCHER: Final[Literal["fetcher"]] = "fetcher"

LONGEST_BACKOFF: Final = 30.0
SLOW_BACKOFF: Final = 10.0
STOPPED_SECONDS: Final = 0.5  # a process that was stopped for so long does not go on by itself
STOPPED_AGAIN_SECONDS: Final = 5.0  # the engine may not have been there to hear it
SILENT_SECONDS: Final = 120.0  # of the engine, from its start on: it gives a sign of life every few seconds
LATE_SECONDS: Final = 5.0  # the supervisor itself was not there to hear it
GRACE_SECONDS: Final = 30.0
STOP_SECONDS: Final = 3.0  # between SIGTERM and SIGKILL
DRAIN_MARGIN_SECONDS: Final = 5.0  # for the engine beyond its own grace


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start the child: a rank's process from a zygote, the others from nothing."""

    name: Name


@dataclass(frozen=True, slots=True)
class SayStopped:
    """Report to the engine that a worker was stopped and not continued."""

    rank: int
    number: int


@dataclass(frozen=True, slots=True)
class Signal:
    name: Name
    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class NotifyLeaving:
    """Report to the engine that this pod was asked to end."""

    grace_seconds: float


@dataclass(frozen=True, slots=True)
class Finish:
    reason: str


Action = Spawn | Signal | SayStopped | NotifyLeaving | Finish


class Phase(enum.StrEnum):
    RUNNING = "running"
    LEAVING = "leaving"  # asked to end; the engine drains (leader), or the engine's Release is awaited (member)
    STOPPING = "stopping"  # every process is being ended
    FINISHED = "finished"


@dataclass(slots=True)
class _Child:
    alive: bool = False  # or being started
    failures: int = 0  # in a row, before it was healthy
    spawn_at: float | None = None
    stopped_at: float | None = None
    stopped_by: int = 0
    silent_at: float | None = None  # the engine's: when it counts as hung


@dataclass(slots=True)
class Machine:
    """`grace_seconds`: for the engine's drain, lame-duck time included; also how long a member waits for Release.
    `fetches`: the model is a hub's. `may_fetch`: the commit is known, or this pod's fetcher finds it out."""

    ranks: Sequence[int]
    is_leader: bool
    grace_seconds: float
    fetches: bool = False
    may_fetch: bool = True
    phase: Phase = Phase.RUNNING
    deadline: float | None = None  # of the phase
    children: dict[Name, _Child] = field(default_factory=dict)
    zygote_is_ready: bool = False

    def start(self, now: float) -> list[Action]:
        """Start everything; the zygote first, it takes longest, and the ranks need it."""
        fetcher: list[Name] = [FETCHER] if self.fetches else []
        names: list[Name] = [ZYGOTE, *fetcher, *self.ranks, *([ENGINE] if self.is_leader else [])]
        self.children = {name: _Child(spawn_at=now) for name in names}
        return self.tick(now)

    def zygote_ready(self, now: float) -> list[Action]:
        """The zygote has imported everything: ranks can be forked from it."""
        self.zygote_is_ready = self.children[ZYGOTE].alive
        return self.tick(now)

    def fetch(self, now: float) -> list[Action]:
        """The model is to be fetched, or looked at again: the commit is known, or a rank could not load it."""
        self.may_fetch = True
        fetcher = self.children.get(FETCHER)
        if fetcher is not None and not fetcher.alive and fetcher.spawn_at is None:
            fetcher.spawn_at = now
        return self.tick(now)

    def fetched(self, now: float) -> list[Action]:
        """The fetcher has ended because the model is here."""
        fetcher = self.children[FETCHER]
        fetcher.alive, fetcher.failures, fetcher.stopped_at = False, 0, None
        return self._finish_if_alone() if self.phase is Phase.STOPPING else self.tick(now)

    def spawn_failed(self, name: Name, reason: str, now: float, *, zygote_is_lost: bool = False) -> list[Action]:
        """The child could not be started: the kernel refused, or the zygote gave none.

        `zygote_is_lost`: it does not reply; a rank waits for another zygote then.
        """
        child = self.children[name]
        child.alive, child.stopped_at, child.silent_at = False, None, None
        if self.phase is Phase.LEAVING and name == ENGINE:
            return self._stop(now, "the engine has gone")
        if self.phase not in (Phase.RUNNING, Phase.LEAVING):
            return self._finish_if_alone()
        if zygote_is_lost:
            child.spawn_at = now
            if not self.zygote_is_ready:  # it has ended, and another is on its way
                return []
            self.zygote_is_ready = False
            return [Signal(ZYGOTE, SIGKILL, reason)]
        child.failures += 1
        child.spawn_at = now + backoff(child.failures)
        return self.tick(now)

    def heard(self, now: float) -> None:
        """The engine has given a sign of life."""
        if self.children[ENGINE].alive:
            self.children[ENGINE].silent_at = now + SILENT_SECONDS

    def stopped(self, name: Name, number: int, now: float) -> None:
        """A child was stopped by a signal."""
        child = self.children[name]
        child.stopped_at, child.stopped_by = now + STOPPED_SECONDS, number

    def continued(self, name: Name) -> None:
        self.children[name].stopped_at = None

    def exited(self, name: Name, *, healthy: bool, now: float, slowly: bool = False) -> list[Action]:
        """A child has ended. `healthy`: it had been useful; `slowly`: restart with longer delays, because a person
        must fix something first."""
        child = self.children[name]
        child.alive, child.stopped_at, child.silent_at = False, None, None
        if name == ZYGOTE:
            self.zygote_is_ready = False
        if self.phase is Phase.LEAVING and name == ENGINE:
            return self._stop(now, "the engine has drained")
        if self.phase is Phase.STOPPING:
            return self._finish_if_alone()
        child.failures = 0 if healthy else child.failures + 1
        child.spawn_at = now + max(backoff(child.failures), SLOW_BACKOFF if slowly else 0.0)
        return self.tick(now)

    def failures(self, name: Name) -> int:
        """How many of the child's processes in a row have ended before they were of use."""
        return self.children[name].failures

    def asked_to_end(self, now: float, *, connected: bool) -> list[Action]:
        """SIGTERM or SIGINT; a second one ends everything now."""
        if self.phase is Phase.LEAVING:
            return self._stop(now, "asked twice")
        if self.phase is not Phase.RUNNING:
            return []
        if self.is_leader and self.children[ENGINE].alive:
            self.phase = Phase.LEAVING
            self.deadline = now + self.grace_seconds + DRAIN_MARGIN_SECONDS
            return [Signal(ENGINE, SIGTERM, "drain")]
        if not self.is_leader and connected:
            self.phase, self.deadline = Phase.LEAVING, now + self.grace_seconds
            return [NotifyLeaving(self.grace_seconds)]
        return self._stop(now, "no engine needs this pod")

    def released(self, now: float) -> list[Action]:
        """The engine needs this pod no longer: a member's cue to end, when it was asked to."""
        return self._stop(now, "released") if self.phase is Phase.LEAVING and not self.is_leader else []

    def disconnected(self, now: float) -> list[Action]:
        """The engine is out of reach: nobody can release a member that leaves."""
        return self._stop(now, "the engine is gone") if self.phase is Phase.LEAVING and not self.is_leader else []

    def kill(self, rank: int, reason: str) -> list[Action]:
        """The engine wants a rank's process replaced."""
        child = self.children.get(rank)
        return [Signal(rank, SIGKILL, reason)] if child is not None and child.alive else []

    def tick(self, now: float) -> list[Action]:
        """Do what is due."""
        if self.deadline is not None and now >= self.deadline:
            if self.phase is Phase.LEAVING:
                return self._stop(now, "the grace is over")
            self.deadline = None
            return [Signal(name, SIGKILL, "it did not end") for name, child in self.children.items() if child.alive]
        if self.phase not in (Phase.RUNNING, Phase.LEAVING):
            return []
        actions: list[Action] = []
        for name, child in self.children.items():
            if child.stopped_at is not None and now >= child.stopped_at:
                child.stopped_at = now + STOPPED_AGAIN_SECONDS
                actions.append(self._resume_or_kill(name, child))
            if child.alive and child.silent_at is not None and now >= child.silent_at:
                actions += self._judge_silence(name, child, now)
            if child.spawn_at is not None and now >= child.spawn_at and self._can_start(name):
                child.alive, child.spawn_at = True, None
                child.silent_at = now + SILENT_SECONDS if name == ENGINE else None
                actions.append(Spawn(name))
        return actions

    def _judge_silence(self, name: Name, child: _Child, now: float) -> list[Action]:
        """Where this process was itself kept from running, the other may have been, too."""
        was_late = child.silent_at is not None and now - child.silent_at > LATE_SECONDS
        child.silent_at = now + (GRACE_SECONDS if was_late else SILENT_SECONDS)
        return [] if was_late else [Signal(name, SIGKILL, f"it has given no sign of life for {SILENT_SECONDS:.0f} s")]

    def _can_start(self, name: Name) -> bool:
        if name == FETCHER:
            return self.may_fetch
        return self.zygote_is_ready or not isinstance(name, int)

    def _resume_or_kill(self, name: Name, child: _Child) -> Action:
        """What becomes of a stopped worker is the engine's to decide; of any other child, ours."""
        if isinstance(name, int):
            return SayStopped(name, child.stopped_by)
        return Signal(name, SIGKILL, f"it was stopped by signal {child.stopped_by}")

    def next_deadline(self) -> float | None:
        """When `tick` has something to do next; None: never, by itself."""
        children = self.children.items()
        times = [child.stopped_at for _, child in children if child.stopped_at is not None]
        times += [child.silent_at for _, child in children if child.alive and child.silent_at is not None]
        times += [child.spawn_at for name, child in children if child.spawn_at is not None and self._can_start(name)]
        return min([*times, *([self.deadline] if self.deadline is not None else [])], default=None)

    def _stop(self, now: float, reason: str) -> list[Action]:
        self.phase, self.deadline = Phase.STOPPING, now + STOP_SECONDS
        self._reason = reason
        for child in self.children.values():
            child.spawn_at = child.stopped_at = child.silent_at = None
        alive = [name for name, child in self.children.items() if child.alive]
        return [Signal(name, SIGTERM, reason) for name in alive] or self._finish_if_alone()

    _reason: str = ""

    def _finish_if_alone(self) -> list[Action]:
        if any(child.alive for child in self.children.values()):
            return []
        self.phase, self.deadline = Phase.FINISHED, None
        return [Finish(self._reason)]


def backoff(failures: int) -> float:
    """Seconds before the next start: 0 after a healthy life and after the first failure, then 1, 2, 4 … 30."""
    return 0.0 if failures < 2 else min(LONGEST_BACKOFF, 2.0 ** min(failures - 2, 16))
