"""Collectives as exchanges: every rank sees every other's tensor, piece by piece, and sums them in rank order.

The same order on every rank gives the same bits on every rank. What a kind of communicator adds is how a piece gets
across: through shared memory, or over TCP.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

PIECE_BYTES: Final = 1024 * 1024  # the most that is exchanged at once; a longer tensor goes in pieces


class Slots:
    """Where the pieces of all ranks lie: one memory for each, seen as whatever a piece is made of."""

    def __init__(self, memories: Sequence[Tensor]) -> None:
        """`memories`: PIECE_BYTES bytes for each rank, in rank order."""
        self._memories = memories
        self._views: dict[tuple[torch.dtype, int], tuple[Tensor, ...]] = {}

    def like(self, piece: Tensor) -> tuple[Tensor, ...]:
        """One slot of the piece's type and length for each rank."""
        key = (piece.dtype, piece.shape[0])
        found = self._views.get(key)
        if found is None:
            if len(self._views) > 256:  # prefill chunks come in many sizes
                self._views.clear()
            found = tuple(memory[: piece.nbytes].view(piece.dtype) for memory in self._memories)
            self._views[key] = found
        return found


class HostCommunicator(ABC):
    """One rank's end; see `distributed.communicator`. All methods but `release` belong to one thread."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.on_wait: Callable[[int | None], None] = lambda rank: None  # for this rank's part; None: it has come

    def all_reduce(self, tensor: Tensor, place: str = "") -> Tensor:
        """Sum over ranks, in place; contiguous, on the CPU."""
        flat = tensor.view(-1)
        at_once = PIECE_BYTES // tensor.itemsize
        if flat.shape[0] <= at_once:
            self._sum(flat)
        else:
            for piece in torch.split(flat, at_once):
                self._sum(piece)
        return tensor

    def gather(self, tensor: Tensor, place: str = "") -> list[Tensor] | None:
        """Every rank's tensor (of one shape), in rank order, on rank 0; None elsewhere."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)] if self.rank == 0 else None
        flats = [part.view(-1) for part in parts or ()]
        at = 0
        for piece in torch.split(tensor.reshape(-1), PIECE_BYTES // tensor.itemsize):
            slots = self._exchange(piece, for_rank_0=True)
            for flat, slot in zip(flats, slots, strict=False):  # rank 0 alone has any
                flat[at : at + slot.shape[0]].copy_(slot)
            at += piece.shape[0]
        return parts

    def _sum(self, piece: Tensor) -> None:
        add(self._exchange(piece), piece)

    @abstractmethod
    def _exchange(self, piece: Tensor, *, for_rank_0: bool = False) -> tuple[Tensor, ...]:
        """Every rank's piece, in rank order, valid until the next exchange; of use to rank 0 alone if it is for it."""


def add(slots: Sequence[Tensor], out: Tensor) -> None:
    """In rank order."""
    torch.add(slots[0], slots[1], out=out)
    for slot in slots[2:]:
        out.add_(slot)
