"""The zygotes of one pod, as its supervisor sees them: the pod's own, and on CPUs one per rank that has loaded."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

import msgspec

from lockstep_runtime.zygote.client import ZygoteClient, ZygoteLostError
from lockstep_runtime.zygote.messages import ForkRequest

logger = logging.getLogger(__name__)

FORK_SECONDS: Final = 5.0  # within which the pod's zygote replies; else another takes its place
LOADED_FORK_SECONDS: Final = 1.0  # the same of a loaded one; else the pod's is asked


class ZygotePool:
    """A rank's first process is forked from the pod's zygote, its next ones from the zygote that it left, if it did."""

    def __init__(self) -> None:
        self._pod: ZygoteClient | None = None
        self._loaded: dict[int, ZygoteClient] = {}  # by rank
        self._ending: dict[int, list[ZygoteClient]] = {}  # loaded ones that were told to

    def renew(self) -> ZygoteClient:
        """The client of a new zygote of the pod, which takes the place of the old one."""
        self.dismiss()
        self._pod = ZygoteClient()
        return self._pod

    def dismiss(self) -> None:
        """The pod's zygote exits."""
        if self._pod is not None:
            self._pod.end()
            self._pod = None

    async def wait_until_ready(self) -> bool:
        """Whether the pod's zygote is; False if it has ended instead."""
        return self._pod is not None and await self._pod.wait_until_ready()

    async def fork(self, request: ForkRequest) -> int:
        """The pid of a new process; the request's descriptors stay open here.

        Raises:
            ZygoteLostError: the pod's zygote isn't ready or doesn't reply.
            OSError: the kernel refused a process.
        """
        await self._wait_for_ended(request.rank)
        return await self._fork_loaded(request) or await self._fork_anew(request)

    def has_loaded(self, rank: int) -> bool:
        """Whether the rank has left a zygote, by now."""
        return rank in self._loaded and self._loaded[rank].check_ready()

    async def _fork_loaded(self, request: ForkRequest) -> int | None:
        if self.has_loaded(request.rank):
            try:
                pid = await self._loaded[request.rank].fork(LOADED_FORK_SECONDS, request)
                logger.info("rank %d has a new process from its loaded zygote (pid %d)", request.rank, pid)
                return pid
            except OSError as error:
                logger.warning("the loaded zygote of rank %d gave no process: %s", request.rank, error)
        self.end_loaded(request.rank)
        await self._wait_for_ended(request.rank)
        return None

    async def _fork_anew(self, request: ForkRequest) -> int:
        if self._pod is None or not self._pod.is_ready:
            raise ZygoteLostError("there is no zygote that is ready")
        self._loaded[request.rank] = loaded = ZygoteClient()
        with loaded.theirs as theirs:
            return await self._pod.fork(FORK_SECONDS, msgspec.structs.replace(request, zygote=theirs.fileno()))

    def end_loaded(self, rank: int) -> None:
        """The rank's next process loads again; `fork` waits until this one has freed its memory."""
        if loaded := self._loaded.pop(rank, None):
            loaded.end()
            self._ending.setdefault(rank, []).append(loaded)

    async def end_all_loaded(self) -> None:
        """Returns when they have ended, a second after they were told to at most."""
        for rank in list(self._loaded):
            self.end_loaded(rank)
        await asyncio.gather(*(self._wait_for_ended(rank) for rank in list(self._ending)))

    async def _wait_for_ended(self, rank: int) -> None:
        for loaded in self._ending.pop(rank, []):
            await loaded.ended()
