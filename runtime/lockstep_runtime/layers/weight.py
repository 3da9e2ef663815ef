"""A rank's tensors, and how they take over what the loader reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Protocol

import torch
from torch import Tensor

from lockstep_runtime.layers.placement import Placement
from lockstep_runtime.weights.plan import Cut

WINDOW_BYTES: Final = 16 * 1024 * 1024  # what is staged at once, so that loading needs little more than the weights


class Weight(Protocol):
    """One tensor of a rank: a stack of cuts."""

    @property
    def cuts(self) -> tuple[Cut, ...]: ...

    def receive(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield (start, stop, buffer): the caller fills the buffer with those rows, then asks for the next."""


class PlainWeight:
    """A stack of cuts as one row-major tensor, `data`; rows beyond the cuts are zero."""

    def __init__(self, *cuts: Cut, placement: Placement, rows: int | None = None, dtype: torch.dtype | None = None):
        self.cuts = cuts
        self._placement = placement
        self._dtype = dtype or placement.activation
        self._rows = rows if rows is not None else stacked_rows(cuts)
        self.data: Tensor

    def receive(self) -> Iterator[tuple[int, int, Tensor]]:
        shape = (self._rows, *self.cuts[0].local_shape[1:])
        filled = stacked_rows(self.cuts)
        self.data = torch.empty(shape, dtype=self._dtype, device=self._placement.device)
        self.data[filled:].zero_()
        if self._placement.device.type == "cpu":
            yield 0, filled, self.data[:filled]
            return
        for start, stop in windows(filled, self.data[0].nbytes if filled else 1):
            staging = torch.empty((stop - start, *shape[1:]), dtype=self._dtype, pin_memory=True)
            yield start, stop, staging
            self.data[start:stop].copy_(staging)


def stacked_rows(cuts: tuple[Cut, ...]) -> int:
    return sum(cut.rows for cut in cuts)


def windows(rows: int, row_bytes: int, at_most: int = WINDOW_BYTES, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Cut `rows` into ranges of at most so many bytes (one `multiple` of rows at least)."""
    step = max(1, at_most // (row_bytes * multiple)) * multiple
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
