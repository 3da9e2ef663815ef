"""What collectives raise."""

from __future__ import annotations


class CommunicatorError(RuntimeError):
    """The communicator could not be made, or broke."""


class CommunicatorAborted(CommunicatorError):  # noqa: N818 - what happened, not a mistake: someone asked for it
    """The communicator was aborted while, or before, a collective ran."""


class CommunicatorStuckError(CommunicatorError):
    """A call that can't be left or undone did not end: only a new process can go on."""


def check_proof(total: float, size: int) -> None:
    """
    Raises:
        CommunicatorError: `total`, an all-reduce of ones, isn't the number of ranks.
    """
    if total != size:
        raise CommunicatorError(f"an all-reduce of ones gave {total:g}, not {size}")
