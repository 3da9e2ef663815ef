"""A communicator that notes in the worker's progress record which collective it enters and leaves."""

from __future__ import annotations

from torch import Tensor

from lockstep_runtime.parallel.group import Group
from lockstep_runtime.progress import Progress


class WatchedGroup:
    """Any group, watched. What leaves by an exception has not left: the record shows where it was."""

    def __init__(self, group: Group, progress: Progress) -> None:
        self.rank, self.size = group.rank, group.size
        self._group, self._progress = group, progress

    def all_reduce(self, tensor: Tensor, place: str = "") -> Tensor:
        progress = self._progress
        progress.enter_collective(place)
        result = self._group.all_reduce(tensor, place)
        progress.leave_collective()
        return result

    def gather(self, tensor: Tensor, place: str = "") -> list[Tensor] | None:
        self._progress.enter_collective(place)
        parts = self._group.gather(tensor, place)
        self._progress.leave_collective()
        return parts

    def check(self) -> None:
        self._group.check()

    def abort(self) -> None:
        self._group.abort()

    def close(self) -> None:
        self._group.close()
