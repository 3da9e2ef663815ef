"""The ranks of a group, their processes and their pods, as they come and go. Pure: `now` is monotonic seconds."""

from __future__ import annotations

from dataclasses import dataclass

from lockstep_runtime.config import ServeConfig
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.status import RankState
from lockstep_runtime.recovery import actions
from lockstep_runtime.recovery.admission import refusal
from lockstep_runtime.recovery.events import PodConnected, RankExited, RankStopped, Report
from lockstep_runtime.recovery.rank_handle import RankHandle


@dataclass(frozen=True, slots=True)
class Exit:
    """The current process of a rank has ended. `early`: before it was loaded, and not killed by us. `loss`: the message
    of its connection's end; empty while it is open."""

    message: str
    loss: str
    was_connected: bool
    early: bool


class Membership:
    """`handles` by rank."""

    def __init__(self, config: ServeConfig) -> None:
        self.handles = [
            RankHandle(rank=rank, pod_index=rank // config.ranks_per_pod) for rank in range(config.tensor_parallel_size)
        ]
        self._config = config
        self._pods: dict[int, str] = {}  # incarnations of the supervisors that are connected
        self._known_pods: dict[int, str] = {}  # the last ones

    @property
    def incarnations(self) -> list[str]:
        """Of each rank's last process."""
        return [handle.last_incarnation for handle in self.handles]

    def admit(self, hello: bus.Hello, epoch: int) -> bus.Welcome | bus.Refused:
        """Whether this peer belongs here; the epoch rises above what it has seen under another engine."""
        if reason := refusal(hello, self._config, self.handles):
            return bus.Refused(reason=reason)
        known = hello.role is bus.Role.WORKER and self.handles[hello.rank].last_incarnation == hello.incarnation
        return bus.Welcome(epoch=max(epoch, hello.epoch if known else hello.epoch + 1))

    def pod_connected(self, event: PodConnected) -> bool:
        """Whether that pod was not there before, or is another."""
        is_new = self._known_pods.get(event.pod_index) != event.incarnation
        was_away = event.pod_index not in self._pods
        self._pods[event.pod_index] = self._known_pods[event.pod_index] = event.incarnation
        return is_new or was_away

    def pod_disconnected(self, pod_index: int) -> None:
        self._pods.pop(pod_index, None)

    def pod_released(self, pod_index: int) -> None:
        for handle in self.handles:
            if handle.pod_index == pod_index:
                handle.is_released = True

    def left(self, handle: RankHandle, how: str, now: float) -> str:
        """The connection of the rank's process is closed; returns a sentence."""
        text = f"rank {handle.rank} (pid {handle.hello.pid if handle.hello else 0}) {how}"
        handle.leave(text, now)
        return text

    def exited(self, event: RankExited, epoch: int) -> Exit | None:
        """None: of a process that another has replaced, or that never connected."""
        handle = self.handles[event.rank]
        handle.ended = event.incarnation
        if handle.last_incarnation != event.incarnation:
            return None
        early = handle.loaded is None and handle.arrived_epoch >= epoch and handle.being_killed != event.incarnation
        message = f"rank {event.rank} (pid {event.pid}) {event.how}"
        connected = handle.hello is not None
        return Exit(message, loss="" if connected else handle.loss, was_connected=connected, early=early)

    def stopped(self, event: RankStopped) -> str:
        """A sentence; empty: it is no process that is waited for. A new one may be unknown."""
        handle = self.handles[event.rank]
        is_other = handle.hello is not None and handle.last_incarnation != event.incarnation
        if event.incarnation in handle.past_incarnations or is_other:
            return ""
        return f"rank {event.rank} (pid {event.pid}) was stopped by {event.signal}"

    def reported(self, handle: RankHandle, report: Report, now: float) -> actions.Log | None:
        """Apply a rank's report; returns a log line if it is worth one."""
        match report:
            case bus.Aborted():
                handle.set_aborted(report.epoch)
            case bus.Loaded():
                handle.set_loaded(report)
                size, seconds = report.weight_bytes / 1e6, report.seconds
                message = f"rank {handle.rank} has its weights: {size:.1f} MB in {seconds:.2f} s"
                return actions.Log(message, quiet=True, rank=handle.rank)
            case bus.LoadFailed() if handle.set_failed(report):
                message = f"rank {handle.rank} can't load ({report.kind}): {handle.message}"
                return actions.Log(message, rank=handle.rank)
            case bus.LoadProgress():
                before = handle.heard_at
                handle.set_progress(report, now)
                if handle.heard_at > before:
                    self._spread_progress(handle, now)
        return None

    def _spread_progress(self, mover: RankHandle, now: float) -> None:
        """Ranks of a pod that have not begun to load may wait for one of them, which downloads for all."""
        for handle in self.handles:
            if handle.pod_index == mover.pod_index and handle.state is RankState.STARTING:
                handle.heard_at = handle.furthest_at = now

    def send_aborts(self, epoch: int, now: float) -> list[actions.SendAbort]:
        """Level-triggered: to every rank that has not got this epoch's."""
        untold = [one for one in self.handles if one.hello is not None and one.welcome_epoch < epoch]
        for handle in untold:
            handle.welcome_epoch = epoch
            if handle.loaded is not None:
                handle.abort_sent_at = now
        return [actions.SendAbort(handle.rank, epoch) for handle in untold]

    def can_kill(self, handle: RankHandle) -> bool:
        """Whether the rank's supervisor is connected and the process is known."""
        return handle.pod_index in self._pods and bool(handle.last_incarnation)

    def kill(
        self, handle: RankHandle, reason: str, now: float, incarnation: str = "", *, reload: bool = True
    ) -> actions.Kill | None:
        """None if its supervisor is not connected. `incarnation`: of a process that may not have connected."""
        incarnation = incarnation or handle.last_incarnation
        if not incarnation or handle.pod_index not in self._pods:
            return None
        handle.set_killed(incarnation, now)
        return actions.Kill(handle.rank, incarnation, reason, reload)
