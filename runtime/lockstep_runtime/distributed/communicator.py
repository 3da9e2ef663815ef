"""What a rank needs of its communicator, however it is made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Rendezvous(Protocol):
    """Rank 0's meeting place of one epoch. It may be closed when every rank has joined, or when it is given up."""

    @property
    def address(self) -> str:
        """tcp://host:port or shm://path."""

    @property
    def keeps(self) -> bool:
        """Whether it may be opened long before it is needed, and for any epoch."""

    def close(self) -> None: ...


class Communicator(Protocol):
    """One rank's end of the communicator. `place` names the caller, for who watches it (`distributed.traced`)."""

    rank: int
    size: int

    def all_reduce(self, tensor: Tensor, place: str = "") -> Tensor:
        """Sum over ranks, in place, the same bits on every rank. `tensor` is contiguous."""

    def gather(self, tensor: Tensor, place: str = "") -> list[Tensor] | None:
        """Every rank's tensor (all of one shape), in rank order, on rank 0; None elsewhere."""

    def check(self) -> None:
        """Raise CommunicatorAborted if it was aborted: on a GPU collectives return before they are done."""

    def release(self) -> None:
        """Leave: from any thread, any number of times, at once. A waiting collective raises CommunicatorAborted."""

    def close(self) -> None:
        """Leave, and give back what it holds. By the thread that computes, when nothing refers to it any more.

        Raises:
            CommunicatorStuckError: it can't be given back; only a new process can go on.
        """
