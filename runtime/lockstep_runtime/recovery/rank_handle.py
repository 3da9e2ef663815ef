"""What the group knows of one rank, and how the status shows it. Pure: `now` is monotonic seconds.

What is `…_due` is a time on that clock at which a wait for the rank is over; None: nothing is waited for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.status import Download, RankState, RankStatus
from lockstep_runtime.recovery.bounded import bounded
from lockstep_runtime.recovery.latency import LatencyWindow

REPLACED_KEPT: Final = 64


@dataclass(slots=True)
class RankHandle:
    """`hello`: of the process that is connected. `idle_epoch`: loaded, in no communicator, and deaf to every epoch
    below this; -1 while it can't join."""

    rank: int
    pod_index: int
    hello: bus.Hello | None = None
    state: RankState = RankState.ABSENT
    loaded: bus.Loaded | None = None
    welcome_epoch: int = 0
    idle_epoch: int = -1
    abort_sent_at: float | None = None  # until answered
    joined_epoch: int = 0
    respawns: int = 0
    last_step: int = -1
    last_step_at: float | None = None  # unix seconds
    latency: LatencyWindow = field(default_factory=LatencyWindow)
    memory_bytes: int = 0
    load_done: int = 0
    load_total: int = 0
    download: Download | None = None  # for which it waits
    message: str = ""
    last_incarnation: str = ""
    past_incarnations: dict[str, None] = field(default_factory=dict)  # that were replaced, the newest ones
    being_killed: str = ""  # an incarnation
    killed_at: float = 0.0
    ended: str = ""  # the incarnation whose end is known
    is_released: bool = False  # its pod was asked to end and may; until a process of the next pod is there
    left_at: float | None = None  # when its connection was lost
    loss: str = ""  # what was said then
    arrived_epoch: int = -1
    heard_at: float = 0.0  # when its process last got further in loading
    furthest: int = 0  # the most that a process of it has loaded since the group waits for it, in bytes
    furthest_at: float = 0.0  # when that rose, or the wait began
    load_failure: bus.LoadFailure | None = None  # of the last process, until one has loaded
    failed_at_bytes: int = 0  # where the last failed load had come

    # --- what happens to it

    def arrive(self, hello: bus.Hello, epoch: int, now: float) -> None:
        """A process of this rank has connected: a new one, or one that lost its connection."""
        if self.last_incarnation and hello.incarnation != self.last_incarnation:
            self._replace(self.last_incarnation)
            self.respawns += 1
            self.latency = LatencyWindow()
            self.load_done = self.load_total = 0
        if self.is_released and hello.incarnation != self.last_incarnation:
            self.is_released, self.furthest_at = False, now  # it is waited for from here on
        self.last_incarnation = hello.incarnation
        self.hello = hello
        self.left_at, self.heard_at = None, now
        if self.state is not RankState.FAILED:  # why the last one failed stays to be read until this one gets further
            self.state, self.message = RankState.STARTING, ""
        self.loaded = None
        self.welcome_epoch = self.arrived_epoch = epoch
        self.idle_epoch = -1
        self.abort_sent_at = None

    def _replace(self, incarnation: str) -> None:
        if len(self.past_incarnations) >= REPLACED_KEPT:
            del self.past_incarnations[next(iter(self.past_incarnations))]
        self.past_incarnations[incarnation] = None

    def leave(self, message: str, now: float) -> None:
        """Its connection is closed."""
        self.hello = self.download = None
        self.left_at, self.loss = now, message
        self.loaded = None
        self.idle_epoch = -1
        self.abort_sent_at = None
        if self.state is not RankState.FAILED:  # the words of a failed load stay until a process gets further
            self.state, self.message = RankState.ABSENT, message

    def begin_forming(self, now: float) -> None:
        """From now on it is waited for."""
        self.furthest, self.furthest_at = 0, now

    def set_progress(self, progress: bus.LoadProgress, now: float) -> None:
        moved = max(progress.bytes_done, progress.bytes_moved)
        if progress.bytes_done != self.load_done or moved > self.furthest:
            self.heard_at = now
        if moved > self.furthest:
            self.furthest, self.furthest_at = moved, now
        self.load_done, self.load_total = progress.bytes_done, progress.bytes_total
        self.download = progress.download
        if self.state is not RankState.FAILED or progress.bytes_done > self.failed_at_bytes:
            self.message = ""
            self.state = RankState.LOADING if progress.bytes_total else RankState.STARTING

    def set_failed(self, failure: bus.LoadFailed) -> bool:
        """Set the load error; returns whether it is new."""
        message, self.load_failure = bounded(failure.message), failure.kind
        news = self.state is not RankState.FAILED or self.message != message
        self.state, self.message = RankState.FAILED, message
        self.failed_at_bytes = max(self.failed_at_bytes, self.load_done)
        return news

    def set_loaded(self, loaded: bus.Loaded) -> None:
        self.loaded, self.download = loaded, None
        self.state, self.message, self.failed_at_bytes = RankState.LOADED, "", 0
        self.load_failure = None
        self.memory_bytes = loaded.memory_bytes
        self.load_done = self.load_total = loaded.weight_bytes
        self.idle_epoch = self.welcome_epoch

    def set_killed(self, incarnation: str, now: float) -> None:
        """Mark its process as being killed: its messages no longer count."""
        self.being_killed, self.killed_at = incarnation, now
        if incarnation == self.last_incarnation:
            self.loaded, self.idle_epoch, self.abort_sent_at = None, -1, None

    def set_aborted(self, epoch: int) -> None:
        self.abort_sent_at = None
        if self.loaded is not None:
            self.idle_epoch = max(self.idle_epoch, epoch)
            self.state = RankState.LOADED

    def stepped(self, answer: bus.StepDone, at: float) -> None:
        """`at`: unix seconds."""
        self.last_step, self.last_step_at = answer.step, at
        self.latency.add(answer.seconds)

    # --- until when it is waited for

    def abort_due(self, seconds: float) -> float | None:
        """It was to leave its collective."""
        return None if self.abort_sent_at is None else self.abort_sent_at + seconds

    def reconnect_due(self, seconds: float) -> float | None:
        """Its process lives, for all that is known, and has lost its connection."""
        unknown = self.last_incarnation not in (self.being_killed, self.ended)
        return self.left_at + seconds if self.hello is None and unknown and self.left_at is not None else None

    def death_due(self, seconds: float) -> float | None:
        """It was killed, and its connection is still there."""
        dying = self.hello is not None and self.being_killed == self.last_incarnation
        return self.killed_at + seconds if dying else None

    def stall_due(self, seconds: float) -> float | None:
        """Its process loads and gets no further."""
        loading = self.hello is not None and self.state in (RankState.STARTING, RankState.LOADING)
        return self.heard_at + seconds if loading and self.being_killed != self.last_incarnation else None

    def absent_due(self, seconds: float, begun: float) -> float | None:
        """It is out of reach. `begun`: since when the group waits. When the successor of a pod that was let go comes is
        the cluster's affair."""
        is_missed = self.hello is None and not self.is_released
        return max(begun, self.left_at or begun) + seconds if is_missed else None

    def stuck_due(self, seconds: float) -> float | None:
        """No process of it has come further than one did before."""
        return self.furthest_at + seconds if self.loaded is None and not self.is_released else None

    def status(self) -> RankStatus:
        hello = self.hello
        return RankStatus(
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
