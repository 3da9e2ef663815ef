"""The group's status as this supervisor serves it: the engine's last word, stamped with a revision that only rises."""

from __future__ import annotations

import asyncio
import secrets
import time

import msgspec

from lockstep_runtime import wire
from lockstep_runtime.config import ServeConfig


class StatusBoard:
    """Readers wait for the next revision; the engine's reports and its death are what changes it."""

    def __init__(self, config: ServeConfig) -> None:
        self.incarnation = secrets.token_hex(8)
        self.from_engine: wire.GroupStatus | None = None
        self._changed = asyncio.Event()
        self.status = wire.GroupStatus(
            model=config.model_name,
            group=config.group,
            incarnation=self.incarnation,
            revision=1,
            spec_revision=config.spec_revision,
            message="the engine is starting",
            since=time.time(),
            ranks=[
                wire.RankStatus(rank=rank, pod_index=rank // config.ranks_per_pod)
                for rank in range(config.tensor_parallel_size)
            ],
        )

    def take(self, status: wire.GroupStatus) -> None:
        """What the engine says now."""
        self.from_engine = status
        self._publish(status)

    def engine_lost(self, how: str) -> None:
        """The engine's process has ended; what it knew of the ranks is void until the next one speaks."""
        ranks = [
            msgspec.structs.replace(rank, state=wire.RankState.ABSENT, message="the engine is gone")
            for rank in self.status.ranks
        ]
        message = f"the engine {how} and is started again"
        state = wire.GroupState.RECOVERING if self.from_engine is not None else wire.GroupState.STARTING
        self._publish(
            msgspec.structs.replace(self.status, state=state, message=message, since=time.time(), ranks=ranks)
        )

    def _publish(self, status: wire.GroupStatus) -> None:
        revision = self.status.revision + 1
        self.status = msgspec.structs.replace(status, incarnation=self.incarnation, revision=revision)
        self._changed.set()
        self._changed = asyncio.Event()

    async def after(self, revision: int | None, seconds: float) -> wire.GroupStatus:
        """The status: at once when its revision is another than the reader's, else when it changes or time is up."""
        changed = self._changed
        if revision == self.status.revision:
            try:
                async with asyncio.timeout(seconds):
                    await changed.wait()
            except TimeoutError:
                pass
        return self.status
