"""Whether a member pod is ready: as its group is, by the engine's word."""

from __future__ import annotations

import time
from dataclasses import dataclass

from lockstep_runtime.protocol.bus import GroupReadiness
from lockstep_runtime.supervisor.status_store import BELIEVED_SECONDS


@dataclass(slots=True)
class MemberReadiness:
    """A pod that comes to a group which recovers is ready when that is whole; one that was there stays ready through a
    short pause, as the leader does."""

    _said: GroupReadiness | None = None
    _heard_at: float = 0.0  # monotonic
    _was_whole: bool = False  # since this pod is here and the group takes requests

    def take(self, said: GroupReadiness, now: float) -> None:
        """The engine's latest word."""
        self._said, self._heard_at = said, now
        self._was_whole = said.accepting and (said.whole or self._was_whole)

    @property
    def why_unready(self) -> str:
        """Why the pod isn't ready; empty: it is."""
        if self._said is None:
            return "the leader hasn't been reached yet"
        if time.monotonic() - self._heard_at > BELIEVED_SECONDS:
            return f"the leader has not been heard of for {BELIEVED_SECONDS:.0f} s"
        return "" if self._was_whole else self._said.message or "it isn't whole yet"
