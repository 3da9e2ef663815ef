"""A rank that is lost at a chosen collective, for groups in one process."""

from __future__ import annotations

from torch import Tensor

from lockstep_runtime.distributed.communicator import Communicator
from lockstep_runtime.distributed.errors import CommunicatorAborted


class CutOff:
    """A rank's end of a communicator, which is lost before or after the collective of a number."""

    def __init__(self, group: Communicator, at: int, *, after: bool) -> None:
        self.rank, self.size = group.rank, group.size
        self.check, self.release, self.close = group.check, group.release, group.close
        self._group, self._at, self._after = group, at, after
        self.count = 0  # of collectives that are done

    def all_reduce(self, tensor: Tensor, place: str = "") -> Tensor:
        self._before()
        result = self._group.all_reduce(tensor, place)
        self._done()
        return result

    def gather(self, tensor: Tensor, place: str = "") -> list[Tensor] | None:
        self._before()
        parts = self._group.gather(tensor, place)
        self._done()
        return parts

    def _before(self) -> None:
        if self.count == self._at and not self._after:
            self._lose()

    def _done(self) -> None:
        if self.count == self._at and self._after:
            self._lose()
        self.count += 1

    def _lose(self) -> None:
        self.release()  # which lets the others go, as the engine would
        raise CommunicatorAborted("this rank is lost, says a test")
