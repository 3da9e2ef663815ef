"""How many blocks of KV cache every rank has. Pure: `now` is monotonic seconds.

As many as at the first time: a rank may offer less for a while, as long as memory of a process that was killed is held.
Only when it has no more room for some seconds do all get less, and the full number again when all have room for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lockstep_runtime.recovery.timing import ROOM_LOOK_SECONDS, ROOM_SECONDS


@dataclass(slots=True)
class CachePlan:
    """`blocks` and `state_slots` of each rank's cache, the probe's included; 0 blocks: not known yet."""

    blocks: int = 0
    state_slots: int = 0  # as at the first time
    _wanted: int = 0  # those of the first time
    _until: float = 0.0

    def choose(self, offers: Sequence[int], state_slots: int, now: float) -> None:
        """For another attempt, in which the ranks offer so many, and all have room for so many state slots."""
        offered, self._until = min(offers), now + ROOM_SECONDS
        if not self._wanted:
            self._wanted, self.state_slots = offered, state_slots
        if not self.blocks or offered >= self._wanted:
            self.blocks = min(offered, self._wanted)

    def forget(self) -> None:
        """Forget the agreed number of blocks: there may be permanently less room."""
        self.blocks = self._wanted = 0

    def retry_at(self, answers: Mapping[int, int], now: float) -> float | None:
        """When to ask again, of ranks that have so many; None: every rank has enough. Where one has had no room for too
        long, all are asked for what it has."""
        short = {rank: blocks for rank, blocks in answers.items() if blocks < self.blocks}
        if not short:
            return None
        if now < self._until:
            return now + ROOM_LOOK_SECONDS
        self.blocks, self._until = min(short.values()), now + ROOM_SECONDS
        return now
