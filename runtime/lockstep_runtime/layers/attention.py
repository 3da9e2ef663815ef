"""Causal attention over the KV cache, grouped-query, for a batch that mixes prefill chunks and single tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lockstep_runtime.layers.batch import Batch, Segment

TILE = 512  # queries at once: bounds the mask, and skips most of what is masked


def attend(queries: Tensor, keys_values: Tensor, batch: Batch) -> Tensor:
    """queries: [tokens, heads, head_dim]; keys_values: [slots, 2, kv_heads, head_dim], the new tokens' already in it.

    Returns [tokens, heads · head_dim].
    """
    out = torch.empty_like(queries)
    for segment in batch.segments:
        keys, values = _context(keys_values, segment)
        if segment.stop - segment.start == 1:
            _attend_one(queries[segment.start], keys, values, out[segment.start])
        else:
            _attend_chunk(queries[segment.start : segment.stop], keys, values, out[segment.start : segment.stop])
    return out.view(out.shape[0], -1)


def _context(keys_values: Tensor, segment: Segment) -> tuple[Tensor, Tensor]:
    """Keys and values, each [kv_heads, context, head_dim]; views where the sequence's blocks lie side by side."""
    if segment.slots is None:
        held = keys_values[segment.first_slot : segment.first_slot + segment.context]
    else:
        held = keys_values[segment.slots]
    keys, values = held.permute(1, 2, 0, 3).unbind(0)
    return keys, values


def _attend_one(query: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
    """query and out: [heads, head_dim]. The heads that share a kv head are its query rows: no head is repeated."""
    kv_heads, _, head_dim = keys.shape
    grouped = query.view(1, kv_heads, -1, head_dim)
    result = F.scaled_dot_product_attention(grouped, keys[None], values[None])
    out.view(1, kv_heads, -1, head_dim).copy_(result)


def _attend_chunk(queries: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
    """queries and out: [tokens, heads, head_dim]; the tokens are the context's last."""
    tokens, context = queries.shape[0], keys.shape[1]
    for start in range(0, tokens, TILE):
        stop = min(start + TILE, tokens)
        seen = context - tokens + stop
        mask = _causal_mask(stop - start, seen, queries)
        result = F.scaled_dot_product_attention(
            queries[None, start:stop].transpose(1, 2), keys[None, :, :seen], values[None, :, :seen],
            attn_mask=mask, enable_gqa=True,
        )  # fmt: skip
        out[start:stop].copy_(result[0].transpose(0, 1))


def _causal_mask(queries: int, seen: int, like: Tensor) -> Tensor:
    """Added to the scores: the queries are the last of what is seen, and see nothing after themselves."""
    mask = torch.full((queries, seen), float("-inf"), dtype=like.dtype, device=like.device)
    return mask.triu_(seen - queries + 1)
