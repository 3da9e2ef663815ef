"""Causal attention over the KV cache, grouped-query, for a batch that mixes prefill chunks and single tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lockstep_runtime.layers.batch import Batch, Segment
from lockstep_runtime.layers.cache import KVCache, LayerCache
from lockstep_runtime.layers.prefill_attention import ATTEND


def attend(queries: Tensor, cache: LayerCache, batch: Batch) -> Tensor:
    """queries: [tokens, heads, head_dim]; the new tokens' keys and values are already in the cache.

    Returns [tokens, heads * head_dim].
    """
    out = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
    attend_chunk = ATTEND[cache.prefill]
    for segment in batch.segments:
        keys, values = _context(cache.keys, segment), _context(cache.values, segment)
        if segment.stop - segment.start == 1:
            _attend_one(queries[segment.start], keys, values, out[segment.start])
        else:
            chunk = slice(segment.start, segment.stop)
            attend_chunk(queries[chunk], keys, values, out[chunk])
    return out.view(out.shape[0], -1)


def is_finite(cache: KVCache, batch: Batch) -> bool:
    """Whether the contexts that the batch attends to hold neither NaN nor infinity."""
    return all(
        bool(torch.isfinite(_context(held, segment).sum(dtype=torch.float32)))
        for segment in batch.segments
        for layer in cache.layers
        for held in (layer.keys, layer.values)
    )


def _context(held: Tensor, segment: Segment) -> Tensor:
    """[1, kv_heads, context, head_dim]; a view where the sequence's blocks lie side by side."""
    _, heads, width = held.shape
    if segment.slots is None:
        first = held.storage_offset() + segment.first_slot * heads * width
        return held.as_strided((1, heads, segment.context, width), (0, width, heads * width, 1), first)
    return held.index_select(0, segment.slots).transpose(0, 1)[None]


def _attend_one(query: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
    """query and out: [heads, head_dim]. The heads that share a kv head are its query rows: no head is repeated."""
    grouped = (1, keys.shape[1], -1, keys.shape[3])
    out.view(grouped).copy_(F.scaled_dot_product_attention(query.view(grouped), keys, values))
