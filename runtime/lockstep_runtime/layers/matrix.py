"""Matrices that multiply activations from the right: y = x Wᵀ.

On a GPU and in float32 a matrix stays as it is in the checkpoint. On a CPU, half-precision matrices are packed once at
load, window by window, for the sake of faster kernels, and the packed form replaces the plain one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator
from typing import Final, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lockstep_runtime.layers.matmul_kernels import Kernel, Multiply
from lockstep_runtime.layers.placement import Placement
from lockstep_runtime.layers.weight import PlainWeight
from lockstep_runtime.weights.sharding import TensorSlice
from lockstep_runtime.weights.weight import Weight, stacked_rows, windows

PACKED_WINDOW_BYTES = 16 * 1024 * 1024  # in float32; a larger matrix is several packed ones


class Matrix(Weight, Protocol):
    """As many outputs as the slices have rows, as many inputs as they have columns."""

    def __call__(self, x: Tensor) -> Tensor:
        """x: [tokens, inputs] -> [tokens, outputs]."""


def matrix(*slices: TensorSlice, placement: Placement) -> Matrix:
    """The kind of matrix that suits the placement."""
    if placement.kernel is None:
        return PlainMatrix(*slices, placement=placement)
    return PackedMatrix(*slices, kernel=placement.kernel)


class PlainMatrix(PlainWeight):
    """Row-major, multiplied by `F.linear`."""

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.data)


class PackedMatrix:
    """Laid out for a kernel of the CPU's, in one or several windows of rows."""

    cached_dtype: Final = None  # packed again from the checkpoint's own values, so that the result is the same

    def __init__(self, *slices: TensorSlice, kernel: Kernel) -> None:
        self.slices = slices
        self._kernel = kernel
        self._windows: list[Multiply] = []

    def load(self) -> Iterator[tuple[int, int, Tensor]]:
        self._windows = []
        filled, columns = stacked_rows(self.slices), self.slices[0].local_shape[1]
        for start, stop in windows(filled, columns * 4, PACKED_WINDOW_BYTES, multiple=16):
            staging = torch.empty((stop - start, columns), dtype=self._kernel.rows)
            yield start, stop, staging
            self._windows.append(self._kernel.pack(staging))

    def attach(self, stored: Tensor) -> None:
        for start, stop, staging in self.load():
            staging.copy_(stored[start:stop])

    def checksum_in_parts(self) -> Generator[None, None, str]:
        """Of products, since the packed form is opaque: a kernel gives the same bits for the same weights.

        A change that is lost in a product's rounding shows in no other product either.
        """
        hashed = hashlib.blake2b(digest_size=8)
        ramp = torch.linspace(-1.0, 1.0, self.slices[0].local_shape[1], dtype=torch.float32)[None]
        for window in self._windows:
            product = window(ramp.to(self._kernel.activation))
            hashed.update(product.contiguous().view(torch.uint8).numpy().data)
            yield
        return hashed.hexdigest()

    def __call__(self, x: Tensor) -> Tensor:
        if len(self._windows) == 1:
            return self._windows[0](x)
        return torch.cat([x.new_empty(x.shape[0], 0), *(window(x) for window in self._windows)], dim=1)
