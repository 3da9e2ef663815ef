"""What the loader and the weight cache fill: a rank's tensors, each a stack of slices."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Final, Protocol

import torch
from torch import Tensor

from lockstep_runtime.weights.checkpoint import StoredRows
from lockstep_runtime.weights.checksum import checksum_in_parts
from lockstep_runtime.weights.sharding import TensorSlice

WINDOW_BYTES: Final = 16 * 1024 * 1024  # what is staged at once, so that loading needs little more than the weights


class Weight(Protocol):
    """One tensor of a rank: a stack of slices. Nothing changes it once it has been filled: a scrub compares it."""

    @property
    def slices(self) -> tuple[TensorSlice, ...]: ...

    @property
    def cached_dtype(self) -> torch.dtype | None:
        """The type in which the weight cache keeps the stack for `attach`; None: the checkpoint's own."""

    def load(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield (start, stop, buffer): the caller fills the buffer with those rows, then asks for the next."""

    def attach(self, stored: Tensor) -> None:
        """Take the whole stack over from the weight cache, instead of `load`."""

    def checksum_in_parts(self) -> Generator[None, None, str]:
        """What tells that nothing has changed; a pause after every few milliseconds."""


class StoredTable:
    """A table of which few rows are used at a time, left in the checkpoint's file, or in the cache's, and read there.

    For an embedding that is tied to a packed output head: the packed form can't be looked up, and both forms in memory
    would be a quarter more than the whole slice of a small model. A row is read in two microseconds from the page
    cache, which loading has just filled.
    """

    cached_dtype: Final = None  # the head's own stack in the cache serves as the table too

    def __init__(self, tensor_slice: TensorSlice) -> None:
        self.tensor_slice = tensor_slice
        self.rows: StoredRows | None = None
        self._attached: Tensor

    @property
    def slices(self) -> tuple[TensorSlice, ...]:
        return (self.tensor_slice,)

    def attach(self, stored: Tensor) -> None:
        self._attached = stored

    def checksum_in_parts(self) -> Generator[None, None, str]:
        """Of an adopted table; a checkpoint's file is not ours to watch."""
        return checksum_in_parts(torch.empty(0) if self.rows else self._attached)

    def lookup(self, indices: Tensor) -> Tensor:
        """indices: [n] -> [n, columns], in the file's type."""
        return self._attached.index_select(0, indices) if self.rows is None else self.rows.read(indices.tolist())


def stacked_rows(slices: tuple[TensorSlice, ...]) -> int:
    return sum(tensor_slice.rows for tensor_slice in slices)


def windows(rows: int, row_bytes: int, at_most: int = WINDOW_BYTES, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Cut `rows` into ranges of at most so many bytes (one `multiple` of rows at least)."""
    step = max(1, at_most // max(1, row_bytes * multiple)) * multiple
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
