"""One wait until every rank is loaded and idle: who is late, who will not come. Pure: `now` is monotonic seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lockstep_runtime.protocol.bus import LoadFailure
from lockstep_runtime.protocol.status import Fault, RankState
from lockstep_runtime.recovery.diagnosis import Evidence
from lockstep_runtime.recovery.rank_handle import RankHandle
from lockstep_runtime.recovery.timing import ABSENT_SECONDS, DEATH_SECONDS, RECONNECT_SECONDS, Timing


@dataclass(slots=True, kw_only=True)
class Gathering:
    """`abort_seconds`: the time to leave a collective. `suspects`: known stragglers.
    `longest_load`: seconds of the longest complete load. `can_kill`: whether a rank's supervisor is connected."""

    handles: Sequence[RankHandle]
    timing: Timing
    since: float
    has_served: bool
    abort_seconds: float
    suspects: frozenset[int]
    longest_load: float
    can_kill: Callable[[RankHandle], bool]

    @property
    def _loading(self) -> float:
        return self.timing.loading(self.longest_load, has_served=self.has_served)

    @property
    def _stuck(self) -> float:
        return self.timing.stuck(self.longest_load, has_served=self.has_served)

    @property
    def _absent(self) -> float:
        return self.timing.absent(has_served=self.has_served)

    @property
    def _deaf(self) -> float:
        """How long one may not leave its collective whose supervisor is out of reach."""
        return max(ABSENT_SECONDS, 2 * self.abort_seconds)

    def next_deadline(self) -> float | None:
        """When `late` or `hopeless` may next return something."""
        return min((due for handle in self.handles for due in self._dues(handle) if due is not None), default=None)

    def _dues(self, handle: RankHandle) -> list[float | None]:
        dues: list[float | None] = []
        if not self._explains_itself(handle):
            dues += [
                handle.absent_due(self._absent, self.since),
                handle.abort_due(self._deaf),
                handle.stuck_due(self._stuck),
            ]
        if self.can_kill(handle):
            dues += [
                handle.abort_due(self.abort_seconds),
                handle.death_due(DEATH_SECONDS),
                handle.reconnect_due(RECONNECT_SECONDS),
                handle.stall_due(self._loading),
            ]
        return dues

    def _explains_itself(self, handle: RankHandle) -> bool:
        """It failed its first load: its error explains more than the duration."""
        return not self.has_served and handle.state is RankState.FAILED

    def late(self, now: float) -> list[tuple[RankHandle, str]]:
        """Whose processes are to be killed, and why."""
        leaving = self._late_to_leave(now)
        found = ((handle, self._lateness(handle, leaving, now)) for handle in self.handles if self.can_kill(handle))
        return [(handle, how) for handle, how in found if how]

    def _lateness(self, handle: RankHandle, leaving: set[int], now: float) -> str:
        name = f"rank {handle.rank}"
        if handle.rank in leaving:
            return f"{name} did not leave its collective within {self.abort_seconds:g} s"
        if _is_over(handle.death_due(DEATH_SECONDS), now):
            return f"{name} did not end within {DEATH_SECONDS:g} s of its SIGKILL"
        if _is_over(handle.reconnect_due(RECONNECT_SECONDS), now):
            return f"{name} lost its connection and did not come back within {RECONNECT_SECONDS:g} s"
        if _is_over(handle.stall_due(self._loading), now):
            return f"{name} has read none of its weights for {self._loading:g} s"
        return ""

    def _late_to_leave(self, now: float) -> set[int]:
        """Where the one that holds up the others is known it goes first, and the others get the same time again: they
        may only have waited for it."""
        late = {one.rank for one in self.handles if _is_over(one.abort_due(self.abort_seconds), now)}
        suspects = late & self.suspects
        if not suspects or suspects == late or not all(self.can_kill(self.handles[rank]) for rank in suspects):
            return late
        for rank in late - suspects:
            self.handles[rank].abort_sent_at = now
        return suspects

    def hopeless(self, now: float) -> Evidence | None:
        """Against a rank that stays away, or never gets its weights: it is not waited for without end."""
        for handle in self.handles:
            fault = Fault.CONTEXT_FAULT if handle.load_failure is LoadFailure.DEVICE_LOST else Fault.RANK_LOST
            if message := self._hopelessness(handle, now):
                return Evidence(fault, handle.rank, f"rank {handle.rank} {message}", final=True)
        return None

    def _hopelessness(self, handle: RankHandle, now: float) -> str:
        lost, cannot = LoadFailure.DEVICE_LOST, LoadFailure.PERMANENT
        if handle.load_failure is lost or (self.has_served and handle.load_failure is cannot):
            return f"can't load: {handle.message}"
        if self._explains_itself(handle):
            return ""
        pod = f"(pod {handle.pod_index})"
        if _is_over(handle.absent_due(self._absent, self.since), now):
            return f"{pod} has been out of reach for {self._absent:g} s"
        if _is_over(handle.abort_due(self._deaf), now):
            return f"{pod} did not leave its collective within {self._deaf:g} s, and its supervisor is out of reach"
        if _is_over(handle.stuck_due(self._stuck), now):
            return f"{pod} could not get its weights, and got no further for {self._stuck:g} s"
        return ""


def _is_over(due: float | None, now: float) -> bool:
    return due is not None and now >= due
