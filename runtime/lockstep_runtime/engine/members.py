"""One member of the group: what the engine knows of a rank, and how the status shows it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Final

from lockstep_runtime import wire
from lockstep_runtime.engine.bounded import bounded
from lockstep_runtime.engine.bus import Peer
from lockstep_runtime.engine.latency import LatencyWindow
from lockstep_runtime.wire import RankState

RETIRED_KEPT: Final = 64


@dataclass(slots=True)
class Member:
    """`idle_epoch`: loaded, in no communicator, and deaf to every epoch below this; -1 while it can't join."""

    rank: int
    pod_index: int
    peer: Peer | None = None
    state: RankState = RankState.ABSENT
    loaded: wire.Loaded | None = None
    welcome_epoch: int = 0
    idle_epoch: int = -1
    abort_sent_at: float | None = None  # on the monotonic clock, until answered
    joined_epoch: int = 0
    respawns: int = 0
    last_step: int = -1
    last_step_at: float | None = None
    latency: LatencyWindow = field(default_factory=LatencyWindow)
    memory_bytes: int = 0
    load_done: int = 0
    load_total: int = 0
    message: str = ""
    last_incarnation: str = ""
    retired: dict[str, None] = field(default_factory=dict)  # incarnations that were replaced, the newest ones
    condemned: str = ""  # the incarnation that is being killed
    ended: str = ""  # the incarnation whose end is known
    left_at: float | None = None  # on the monotonic clock: when its connection was lost
    arrived_epoch: int = -1
    heard_at: float = 0.0  # and when it last got further in loading
    furthest: int = 0  # the most that a process of it has loaded while the group is formed, in bytes
    furthest_at: float = 0.0  # on the monotonic clock: when that rose, or forming began
    load_failure: wire.LoadFailure | None = None  # of the last process, until one has loaded
    failed_at_bytes: int = 0  # where the last failed load had come

    def arrive(self, peer: Peer, epoch: int) -> None:
        """A process of this rank has connected: a new one, or one that lost its connection."""
        incarnation = peer.hello.incarnation
        if self.last_incarnation and incarnation != self.last_incarnation:
            self._retire(self.last_incarnation)
            self.respawns += 1
            self.latency = LatencyWindow()
            self.load_done = self.load_total = 0
        self.last_incarnation = incarnation
        self.peer = peer
        self.left_at, self.heard_at = None, time.monotonic()
        if self.state is not RankState.FAILED:  # why the last one failed stays to be read until this one gets further
            self.state, self.message = RankState.STARTING, ""
        self.loaded = None
        self.welcome_epoch = self.arrived_epoch = epoch
        self.idle_epoch = -1
        self.abort_sent_at = None

    def _retire(self, incarnation: str) -> None:
        if len(self.retired) >= RETIRED_KEPT:
            del self.retired[next(iter(self.retired))]
        self.retired[incarnation] = None

    def leave(self, message: str) -> None:
        """Its connection is closed."""
        self.peer = None
        self.left_at = time.monotonic()
        self.loaded = None
        self.idle_epoch = -1
        self.abort_sent_at = None
        if self.state is not RankState.FAILED:  # the words of a failed load stay until a process gets further
            self.state, self.message = RankState.ABSENT, message

    def is_cut_off(self, now: float, seconds: float) -> bool:
        """Its process lives, for all that is known, and has not come back for so long."""
        unknown = self.last_incarnation not in (self.condemned, self.ended)
        return self.peer is None and unknown and self.left_at is not None and now - self.left_at > seconds

    def stands_still(self, now: float, seconds: float, *, again: bool) -> bool:
        """It is loading and has got no further for so long. Before a first loading a download may take any time."""
        states = (RankState.LOADING, RankState.STARTING) if again else (RankState.LOADING,)
        loading = self.peer is not None and self.state in states
        return loading and self.condemned != self.last_incarnation and now - self.heard_at > seconds

    def begin_forming(self, now: float) -> None:
        """From now on it is waited for."""
        self.furthest, self.furthest_at = 0, now

    def absent_for(self, now: float, begun: float) -> float:
        """Seconds without a connection since forming began."""
        return now - max(begun, self.left_at or begun) if self.peer is None else 0.0

    def stuck_for(self, now: float) -> float:
        """Seconds in which no process of it has come further than one did before; 0 once it is loaded."""
        return 0.0 if self.loaded is not None else now - self.furthest_at

    def set_progress(self, progress: wire.LoadProgress) -> None:
        moved = max(progress.bytes_done, progress.bytes_moved)
        if progress.bytes_done != self.load_done or moved > self.furthest:
            self.heard_at = time.monotonic()
        if moved > self.furthest:
            self.furthest, self.furthest_at = moved, time.monotonic()
        self.load_done, self.load_total = progress.bytes_done, progress.bytes_total
        if self.state is not RankState.FAILED or progress.bytes_done > self.failed_at_bytes:
            self.message = ""
            self.state = RankState.LOADING if progress.bytes_total else RankState.STARTING

    def set_failed(self, failure: wire.LoadFailed) -> bool:
        """Its own words; whether they are news."""
        message, self.load_failure = bounded(failure.message), failure.kind
        news = self.state is not RankState.FAILED or self.message != message
        self.state, self.message = RankState.FAILED, message
        self.failed_at_bytes = max(self.failed_at_bytes, self.load_done)
        return news

    def set_loaded(self, loaded: wire.Loaded) -> None:
        self.loaded = loaded
        self.state, self.message, self.failed_at_bytes = RankState.LOADED, "", 0
        self.load_failure = None
        self.memory_bytes = loaded.memory_bytes
        self.load_done = self.load_total = loaded.weight_bytes
        self.idle_epoch = self.welcome_epoch

    def set_aborted(self, epoch: int) -> None:
        self.abort_sent_at = None
        if self.loaded is not None:
            self.idle_epoch = max(self.idle_epoch, epoch)
            self.state = RankState.LOADED

    def stepped(self, answer: wire.StepDone, at: float) -> None:
        self.last_step, self.last_step_at = answer.step, at
        self.latency.add(answer.seconds)

    def status(self) -> wire.RankStatus:
        hello = self.peer.hello if self.peer is not None else None
        return wire.RankStatus(
            rank=self.rank,
            pod_index=self.pod_index,
            state=self.state,
            pod=hello.pod if hello else "",
            node=hello.node if hello else "",
            pid=hello.pid if hello else 0,
            incarnation=hello.incarnation if hello else "",
            epoch=self.joined_epoch,
            respawns=self.respawns,
            last_step=self.last_step,
            last_step_at=self.last_step_at,
            step_latency=self.latency.latency(),
            memory_bytes=self.memory_bytes,
            load_bytes_done=self.load_done,
            load_bytes_total=self.load_total,
            message=self.message,
        )
