"""Which attention a rank uses: the fastest that works on its device, by trial."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from lockstep_runtime.layers.attention import Attention, SequenceAttention
from lockstep_runtime.layers.cache import BLOCK_SIZE, LayerCache, PagedShape
from lockstep_runtime.layers.native_attention import NativeAttention
from lockstep_runtime.layers.placement import Placement
from lockstep_runtime.layers.prefill_attention import choose_prefill
from lockstep_runtime.layers.trial import DIFFERS, failure_of, reason
from lockstep_runtime.protocol.step import SequenceSlice

logger = logging.getLogger(__name__)

_CHUNK = SequenceSlice(sequence_id=1, position=32, tokens=[0] * 5, blocks=[3, 1])
_TOKEN = SequenceSlice(sequence_id=2, position=40, tokens=[0], blocks=[0, 2])
_FAR = SequenceSlice(sequence_id=3, position=1100, tokens=[0], blocks=list(range(4, 39)))
TRIED: Final = ((_TOKEN,), (_TOKEN, _FAR), (_CHUNK, _TOKEN), (_CHUNK, _FAR))  # decode and prefill, near and far


def choose_attention(placement: Placement, shape: PagedShape) -> Attention:
    """The fastest way that works on this device for layers of this shape."""
    device, dtype = placement.device, placement.activation
    by_sequence = SequenceAttention(choose_prefill(device, dtype, shape.head_dim))
    faster = paged_attention() if device.type == "cuda" else native_attention(dtype, by_sequence)
    failure = faster if isinstance(faster, str) else differs(faster, device, dtype, shape)
    if failure is None and not isinstance(faster, str):
        return faster
    logger.warning("attention goes sequence by sequence, which is slow in large batches: %s", failure)
    return by_sequence


def native_attention(dtype: torch.dtype, chunks: Attention) -> Attention | str:
    """The one in C, where it is compiled for this CPU; else why there is none."""
    try:
        return NativeAttention(dtype, chunks)
    except OSError as error:
        return reason(error)


def paged_attention() -> Attention | str:
    """The one in Triton, which torch brings where it has CUDA; else why there is none."""
    try:
        paged: Attention = importlib.import_module("lockstep_runtime.layers.paged_attention").PagedAttention()
    except Exception as error:  # Triton looks for compilers and drivers as it is imported
        return reason(error)
    return paged


def differs(attention: Attention, device: torch.device, dtype: torch.dtype, shape: PagedShape) -> str | None:
    """Attend in batches of every kind, which also compiles what there is to compile; returns what is wrong."""
    return failure_of(
        lambda: next(filter(None, (_differs(attention, tried, device, dtype, shape) for tried in TRIED)), None)
    )


def _differs(
    attention: Attention, tried: Sequence[SequenceSlice], device: torch.device, dtype: torch.dtype, shape: PagedShape
) -> str | None:
    generator = torch.Generator().manual_seed(0)

    def numbers(first: int, heads: int) -> Tensor:
        return torch.randn(first, heads, shape.head_dim, generator=generator).to(device, dtype)

    heads = shape.kv_heads * (shape.sharing + 2)
    queries = numbers(sum(len(one.tokens) for one in tried), heads)[:, : shape.kv_heads * shape.sharing]
    slots = BLOCK_SIZE * (1 + max(max(one.blocks) for one in tried))
    cache = LayerCache(*(numbers(slots, shape.kv_heads) for _ in range(2)))
    found = attention.plan(tried, device)(queries, cache)
    plain = LayerCache(cache.keys.float(), cache.values.float())
    expected = SequenceAttention().plan(tried, device)(queries.float(), plain)
    tolerance = 4 * torch.finfo(dtype).eps
    right = torch.allclose(found.float(), expected, rtol=tolerance, atol=tolerance)
    return None if right else DIFFERS
