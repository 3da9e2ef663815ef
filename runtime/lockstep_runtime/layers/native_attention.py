"""Attention on a CPU: one call for all single tokens of a step, over the cache as it lies; chunks go one by one."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from lockstep_runtime.layers.attention import AttendLayer, Attention
from lockstep_runtime.layers.cache import BLOCK_SIZE, LayerCache
from lockstep_runtime.layers.native.library import Argument, function, load
from lockstep_runtime.protocol.step import SequenceSlice

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
_KERNEL: Final[tuple[Argument, ...]] = (_POINTER, _SIZE, *[_POINTER] * 4, *[_SIZE] * 4)


class NativeAttention:
    """Implements `Attention`.

    Raises:
        OSError: by its constructor, where there are no kernels for this CPU and type.
    """

    def __init__(self, dtype: torch.dtype, chunks: Attention, level: str | None = None) -> None:
        """`chunks` attends with several tokens of a sequence; `level`: of instructions, None: the CPU's."""
        self._attend, self._chunks = function(load(dtype, level), "attend", *_KERNEL), chunks

    def plan(self, sequences: Sequence[SequenceSlice], device: torch.device) -> AttendLayer:
        starts = [0]
        for sequence in sequences:
            starts.append(starts[-1] + len(sequence.tokens))
        single = [index for index, sequence in enumerate(sequences) if len(sequence.tokens) == 1]
        table = plan_of([(starts[index], sequences[index]) for index in single])
        chunks = [
            (slice(starts[index], starts[index + 1]), self._chunks.plan([sequence], device))
            for index, sequence in enumerate(sequences)
            if len(sequence.tokens) > 1
        ]

        def attend(queries: Tensor, cache: LayerCache) -> Tensor:
            _, heads, width = queries.shape
            out = queries.new_empty(queries.shape[0], heads * width)
            if single:
                kv_heads = cache.keys.shape[1]
                if queries.stride()[1:] != (width, 1):
                    queries = queries.contiguous()
                self._attend(
                    queries.data_ptr(), queries.stride(0), cache.keys.data_ptr(), cache.values.data_ptr(),
                    out.data_ptr(), table.data_ptr(), len(single), kv_heads, heads // kv_heads, width,
                )  # fmt: skip
            for rows, attend_chunk in chunks:
                out[rows] = attend_chunk(queries[rows], cache)
            return out

        return attend


def plan_of(tokens: Sequence[tuple[int, SequenceSlice]]) -> Tensor:
    """What the kernel reads of each: its row, how many tokens it sees, where in the plan its blocks are; all blocks."""
    heads: list[int] = []
    blocks: list[int] = []
    for row, sequence in tokens:
        length = sequence.position + 1
        heads += (row, length, 3 * len(tokens) + len(blocks))
        blocks += sequence.blocks[: -(-length // BLOCK_SIZE)]
    return torch.tensor(heads + blocks, dtype=torch.int64)
