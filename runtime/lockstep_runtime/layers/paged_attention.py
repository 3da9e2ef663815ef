"""Attention on a GPU: one launch over the KV cache as it lies, whatever the batch is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
import triton
from torch import Tensor

from lockstep_runtime.layers.attention import AttendLayer
from lockstep_runtime.layers.cache import BLOCK_SIZE, LayerCache
from lockstep_runtime.layers.paged_kernels import attend_tile, join_splits
from lockstep_runtime.protocol.step import SequenceSlice

DECODE_ROWS: Final = 16  # queries at once, each token's heads that share a kv head side by side: tl.dot's least
PREFILL_ROWS: Final = 64
KEYS: Final = 64  # at once
EXACT_ROWS, EXACT_KEYS = 16, 32  # of float32, which no tensor core multiplies: larger ones compile for half a minute
PROGRAMS: Final = 256  # that fill a GPU: with fewer the keys are split
SPLIT_KEYS: Final = 256  # a smaller part is not worth a program
MOST_SPLITS: Final = 32
LOG2_E: Final = math.log2(math.e)


class PagedAttention:
    """Implements `Attention`."""

    def plan(self, sequences: Sequence[SequenceSlice], device: torch.device) -> AttendLayer:
        return Planned(sequences, device)


class Planned:
    """One step: block tables, lengths and tiles on the device, by one copy each for all layers."""

    def __init__(self, sequences: Sequence[SequenceSlice], device: torch.device) -> None:
        self._device = device
        self._counts = [len(sequence.tokens) for sequence in sequences]
        contexts = [sequence.position + len(sequence.tokens) for sequence in sequences]
        self._longest = max(contexts)
        blocks = -(-self._longest // BLOCK_SIZE)
        starts = [0]
        for count in self._counts:
            starts.append(starts[-1] + count)
        tables = [[*one.blocks[:blocks], *[0] * (blocks - len(one.blocks))] for one in sequences]
        flat = torch.tensor([*contexts, *starts, *(block for table in tables for block in table)], dtype=torch.int32)
        moved = flat.to(device, non_blocking=True)
        size = len(sequences)
        self._contexts, self._starts, self._tables = moved[:size], moved[size : 2 * size + 1], moved[2 * size + 1 :]
        self._blocks = blocks
        self._tiles: dict[int, Tensor] = {}  # by the heads that share a kv head

    def __call__(self, queries: Tensor, cache: LayerCache) -> Tensor:
        tokens, heads, width = queries.shape
        kv_heads = cache.keys.shape[1]
        sharing = heads // kv_heads
        rows, keys = self._tile(sharing, queries.dtype)
        tiles = self._tiles_for(rows // sharing)
        splits = splits_for(len(tiles) * kv_heads, self._longest)
        padded = max(16, triton.next_power_of_2(width))
        out = torch.empty((tokens, heads, width), dtype=queries.dtype, device=queries.device)
        parts, sums = (
            torch.empty((splits, tokens, heads, size), device=queries.device) if splits > 1 else out
            for size in (width, 2)
        )
        attend_tile[(len(tiles), kv_heads, splits)](
            out, parts, sums, queries, cache.keys, cache.values, tiles, self._tables, self._contexts, self._starts,
            LOG2_E / math.sqrt(width), self._blocks, queries.stride(0), cache.keys.stride(0), tokens, splits,
            HEAD_DIM=width, WIDTH=padded, SHARING=sharing, ROWS=rows, KEYS=keys, BLOCK_SIZE=BLOCK_SIZE,
            SPLIT=splits > 1, PRECISION="ieee", enable_fp_fusion=True,
        )  # fmt: skip
        if splits > 1:
            join_splits[(tokens * heads,)](
                out, parts, sums, tokens * heads, splits,
                HEAD_DIM=width, WIDTH=padded, SPLITS=triton.next_power_of_2(splits), enable_fp_fusion=True,
            )  # fmt: skip
        return out.view(tokens, -1)

    def _tile(self, sharing: int, dtype: torch.dtype) -> tuple[int, int]:
        """Rows and keys at once."""
        if dtype == torch.float32:
            return max(EXACT_ROWS, triton.next_power_of_2(sharing)), EXACT_KEYS
        wanted = DECODE_ROWS if max(self._counts) == 1 else PREFILL_ROWS
        return max(wanted, triton.next_power_of_2(sharing)), KEYS

    def _tiles_for(self, queries: int) -> Tensor:
        """[tiles, 2]: a sequence, and the first token of at most `queries`."""
        if queries not in self._tiles:
            pairs = [(index, first) for index, count in enumerate(self._counts) for first in range(0, count, queries)]
            self._tiles[queries] = torch.tensor(pairs, dtype=torch.int32).to(self._device, non_blocking=True)
        return self._tiles[queries]


def splits_for(programs: int, context: int) -> int:
    """Into how many parts the keys are split. Pure."""
    wanted = -(-PROGRAMS // programs)
    return max(1, min(wanted, context // SPLIT_KEYS, MOST_SPLITS))
