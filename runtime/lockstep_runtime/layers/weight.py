"""A rank's tensors as plain memory of its device."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator

import torch
from torch import Tensor

from lockstep_runtime.layers.placement import Placement
from lockstep_runtime.weights.checksum import checksum_in_parts
from lockstep_runtime.weights.sharding import TensorSlice
from lockstep_runtime.weights.weight import stacked_rows, windows


class PlainWeight:
    """A stack of slices as one row-major tensor, `data`."""

    def __init__(self, *slices: TensorSlice, placement: Placement, dtype: torch.dtype | None = None) -> None:
        self.slices = slices
        self._placement = placement
        self._dtype = self.cached_dtype = dtype or placement.activation
        self.data: Tensor

    def load(self) -> Iterator[tuple[int, int, Tensor]]:
        rows, *rest = stacked_rows(self.slices), *self.slices[0].local_shape[1:]
        self.data = torch.empty((rows, *rest), dtype=self._dtype, device=self._placement.device)
        if self._placement.device.type == "cpu":
            yield 0, rows, self.data
            return
        for start, stop in windows(rows, math.prod(rest) * self._dtype.itemsize):
            staging = torch.empty((stop - start, *rest), dtype=self._dtype, pin_memory=True)
            yield start, stop, staging
            self.data[start:stop].copy_(staging)

    def attach(self, stored: Tensor) -> None:
        """On a CPU the cache's memory becomes the tensor's; to a GPU it goes by pinned windows, at the bus's speed."""
        if self._placement.device.type == "cpu":
            self.data = stored
            return
        for start, stop, staging in self.load():
            staging.copy_(stored[start:stop])

    def checksum_in_parts(self) -> Generator[None, None, str]:
        return checksum_in_parts(self.data)

    def lookup(self, indices: Tensor) -> Tensor:
        """indices: [n] -> those rows."""
        return self.data.index_select(0, indices)
