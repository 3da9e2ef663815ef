"""Which part of which checkpoint tensor a rank holds. Pure.

A `TensorSlice` is a part of one tensor; a rank's matrix is one or several slices stacked by rows (q, k, v read as one).
Every layer makes the slices of its own weights with the functions here, so the loader is one loop that knows no layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class RankInfo:
    """One rank among `size`."""

    rank: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSlice:
    """The range [start, stop) of `tensor` along `dim`; everything along its other dimensions.

    With an `index`, `tensor` is a stack ([experts, outputs, inputs]), and this is a range of the one `tensor[index]`:
    `dim` and `local_shape` leave the stack's own dimension out. `otherwise`: where the same numbers are in checkpoints
    that have no `tensor`, such as stacked experts in the place of single ones; of the same `local_shape`.
    """

    tensor: str
    shape: tuple[int, ...]  # of the whole tensor, as the model's configuration implies
    dim: int = 0
    start: int
    stop: int
    index: int | None = None
    otherwise: TensorSlice | None = None

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Of what the range is cut from."""
        return self.shape if self.index is None else self.shape[1:]

    @property
    def local_shape(self) -> tuple[int, ...]:
        whole = self.whole_shape
        return (*whole[: self.dim], self.stop - self.start, *whole[self.dim + 1 :])

    @property
    def rows(self) -> int:
        return self.local_shape[0]

    @property
    def numel(self) -> int:
        return math.prod(self.local_shape)

    def pieces(self, start: int, stop: int) -> Pieces:
        """Where rows [start, stop) of the slice lie in the tensor, row-major."""
        whole = self.whole_shape
        size = math.prod(whole)
        inner = math.prod(whole[self.dim + 1 :])
        first = self.start * inner + (self.index or 0) * size
        if self.dim == 0:
            return Pieces(first=first + start * inner, count=1, length=(stop - start) * inner, stride=size)
        outer, stride = math.prod(whole[1 : self.dim]), whole[self.dim] * inner  # of a row
        length = (self.stop - self.start) * inner
        return Pieces(first=first + start * outer * stride, count=(stop - start) * outer, length=length, stride=stride)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """`count` pieces of `length` elements each, `stride` elements from one's begin to the next one's."""

    first: int  # element of the tensor
    count: int
    length: int
    stride: int

    @property
    def span(self) -> int:
        """From the first piece's begin to the last one's end."""
        return (self.count - 1) * self.stride + self.length if self.count else 0

    def split(self, most: int) -> Iterator[tuple[int, Pieces]]:
        """Parts that span at most so many elements, each with where it begins among all of the pieces' elements.

        Pieces stay whole if they are short enough.
        """
        if not self.length:
            return
        if self.count > 1 and self.length <= most:
            step = 1 + (most - self.length) // self.stride
            for start in range(0, self.count, step):
                count = min(step, self.count - start)
                yield start * self.length, replace(self, first=self.first + start * self.stride, count=count)
            return
        for piece in range(self.count):
            for start in range(0, self.length, most):
                first, length = self.first + piece * self.stride + start, min(most, self.length - start)
                yield piece * self.length + start, Pieces(first=first, count=1, length=length, stride=self.stride)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows [start, stop) of a slice, and where they lie in the stack it is part of."""

    tensor_slice: TensorSlice
    start: int
    stop: int
    at: int


def replicated(tensor: str, *shape: int) -> TensorSlice:
    """Every rank holds all of it."""
    return TensorSlice(tensor=tensor, shape=shape, start=0, stop=shape[0])


def even_range(total: int, shard: RankInfo) -> tuple[int, int]:
    """Rank's part of `total` things that need not divide evenly: sizes differ by one at most."""
    return total * shard.rank // shard.size, total * (shard.rank + 1) // shard.size


def split_slice(
    tensor: str,
    *shape: int,
    shard: RankInfo,
    dim: int = 0,
    part: tuple[int, int] | None = None,
    index: int | None = None,
    otherwise: TensorSlice | None = None,
) -> TensorSlice:
    """An even share of the rows (dim 0: a column-parallel layer) or columns (dim 1: a row-parallel layer).

    Args:
        part: of several that are packed into one tensor along `dim` (gate and up), the range that is shared.
        index: the one of a stack; `dim` leaves the stack's own dimension out.
        otherwise: the same share of another tensor, for checkpoints that don't have this one.
    """
    base, end = _part(shape, dim, part, index)
    start, stop = even_range(end - base, shard)
    return TensorSlice(
        tensor=tensor, shape=shape, dim=dim, start=base + start, stop=base + stop, index=index, otherwise=otherwise
    )


def head_slice(
    tensor: str, *shape: int, count: int, shard: RankInfo, dim: int = 0, part: tuple[int, int] | None = None
) -> TensorSlice:
    """The share that belongs to the rank's heads; with fewer heads than ranks, ranks share a head.

    `shape[dim]`, or the `part` of it (q, k or v of a packed projection), is `count` heads side by side.
    """
    base, end = _part(shape, dim, part)
    width = (end - base) // count
    first, last = head_range(count, shard)
    return TensorSlice(tensor=tensor, shape=shape, dim=dim, start=base + first * width, stop=base + last * width)


def _part(shape: tuple[int, ...], dim: int, part: tuple[int, int] | None, index: int | None = None) -> tuple[int, int]:
    return part or (0, shape[dim if index is None else dim + 1])


def head_range(count: int, shard: RankInfo) -> tuple[int, int]:
    """[first, last) of the heads that a rank holds; neighbouring ranks hold the same one where there are too few."""
    if count >= shard.size:
        return even_range(count, shard)
    head = shard.rank // (shard.size // count)
    return head, head + 1


def vocabulary_slice(tensor: str, *shape: int, shard: RankInfo) -> TensorSlice:
    """A rank's rows of a table padded to a multiple of the ranks: the last ranks may hold fewer, or none."""
    rows = padded_vocabulary(shape[0], shard) // shard.size
    start = min(shard.rank * rows, shape[0])
    return TensorSlice(tensor=tensor, shape=shape, start=start, stop=min(start + rows, shape[0]))


def padded_vocabulary(size: int, shard: RankInfo) -> int:
    return -(-size // shard.size) * shard.size


def rows_of(slices: tuple[TensorSlice, ...], start: int, stop: int) -> Iterator[Rows]:
    """The pieces of slices that make up rows [start, stop) of their stack; `at` counts from `start`."""
    base = 0
    for tensor_slice in slices:
        first, last = max(start, base), min(stop, base + tensor_slice.rows)
        if first < last:
            yield Rows(tensor_slice, first - base, last - base, first - start)
        base += tensor_slice.rows


def tensor_parallel_sizes(attention_heads: int, kv_heads: int) -> tuple[int, ...]:
    """The group sizes that a model of so many heads can take.

    Every rank needs equally many attention heads, and either equally many kv heads or one that it shares with as many
    ranks as every other. MLP and vocabulary can be split unevenly, so they set no limit.
    """
    return tuple(
        size
        for size in range(1, attention_heads + 1)
        if attention_heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)
    )
