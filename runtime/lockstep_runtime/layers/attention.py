"""Causal attention over paged keys and values, grouped-query, for a batch that mixes prefill chunks and single tokens.

Planned once a step, from the step's sequences; then every layer attends by that plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lockstep_runtime.layers.cache import BLOCK_SIZE, LayerCache
from lockstep_runtime.layers.prefill_attention import ATTEND, Attend, Prefill
from lockstep_runtime.protocol.step import SequenceSlice

AttendLayer = Callable[[Tensor, LayerCache], Tensor]
"""queries [tokens, heads, head_dim], a layer whose cache has the new tokens' keys and values -> [tokens, heads *
head_dim]."""


class Attention(Protocol):
    """What a placement attends with."""

    def plan(self, sequences: Sequence[SequenceSlice], device: torch.device) -> AttendLayer: ...


@dataclass(frozen=True, slots=True)
class Context:
    """The tokens that one sequence sees: the first `length` of its slots."""

    length: int
    first_slot: int  # when its blocks lie side by side; else -1
    slots: Tensor | None  # [length], when they don't

    def of(self, held: Tensor) -> Tensor:
        """held: [slots, kv_heads, head_dim] -> [1, kv_heads, length, head_dim]; a view where the blocks lie side by
        side."""
        _, heads, width = held.shape
        if self.slots is None:
            first = held.storage_offset() + self.first_slot * heads * width
            return held.as_strided((1, heads, self.length, width), (0, width, heads * width, 1), first)
        return held.index_select(0, self.slots).transpose(0, 1)[None]


def context_of(sequence: SequenceSlice, device: torch.device) -> Context:
    """What its last token in this step sees."""
    length = sequence.position + len(sequence.tokens)
    blocks = sequence.blocks[: -(-length // BLOCK_SIZE)]
    if blocks == list(range(blocks[0], blocks[0] + len(blocks))):
        return Context(length, blocks[0] * BLOCK_SIZE, None)
    firsts = torch.tensor(blocks, device=device)[:, None] * BLOCK_SIZE
    return Context(length, -1, (firsts + torch.arange(BLOCK_SIZE, device=device)).view(-1)[:length])


class SequenceAttention:
    """Sequence by sequence, with torch's own kernels: on CPUs a padded batch in one call is no faster."""

    def __init__(self, prefill: Prefill = Prefill.MASKED) -> None:
        self._attend_chunk = ATTEND[prefill]

    def plan(self, sequences: Sequence[SequenceSlice], device: torch.device) -> AttendLayer:
        counts = [len(sequence.tokens) for sequence in sequences]
        contexts = [context_of(sequence, device) for sequence in sequences]

        def attend(queries: Tensor, cache: LayerCache) -> Tensor:
            out = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
            start = 0
            for count, context in zip(counts, contexts, strict=True):
                chunk = slice(start, start + count)
                _attend_sequence(
                    queries[chunk], context.of(cache.keys), context.of(cache.values), out[chunk], self._attend_chunk
                )
                start += count
            return out.view(out.shape[0], -1)

        return attend


def _attend_sequence(queries: Tensor, keys: Tensor, values: Tensor, out: Tensor, attend_chunk: Attend) -> None:
    if len(queries) > 1:
        attend_chunk(queries, keys, values, out)
        return
    grouped = (1, keys.shape[1], -1, keys.shape[3])  # the heads that share a kv head are its query rows
    out.view(grouped).copy_(F.scaled_dot_product_attention(queries.view(grouped), keys, values))
