"""A communicator that notes in the worker's progress record which collective it enters and leaves."""

from __future__ import annotations

from torch import Tensor

from lockstep_runtime.distributed.communicator import Communicator
from lockstep_runtime.distributed.host_collectives import HostCommunicator
from lockstep_runtime.protocol.progress_record import Progress


class TracedCommunicator:
    """Any group, watched. What leaves by an exception has not left: the record shows where it was."""

    def __init__(self, group: Communicator, progress: Progress) -> None:
        self.rank, self.size = group.rank, group.size
        if isinstance(group, HostCommunicator):
            group.on_wait = progress.wait_for
        self._enter, self._leave = progress.enter_collective, progress.leave_collective
        self._all_reduce, self._gather = group.all_reduce, group.gather
        self.check, self.release, self.close = group.check, group.release, group.close

    def all_reduce(self, tensor: Tensor, place: str = "") -> Tensor:
        self._enter(place)
        result = self._all_reduce(tensor, place)
        self._leave()
        return result

    def gather(self, tensor: Tensor, place: str = "") -> list[Tensor] | None:
        self._enter(place)
        parts = self._gather(tensor, place)
        self._leave()
        return parts
