"""Grouped-query attention whose output is gated, and whose heads are rotated in part, as in Qwen3-Next and Qwen3.5.

Source: transformers' `Qwen3NextAttention`; the gate: https://arxiv.org/abs/2505.06708.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lockstep_runtime.distributed.communicator import Communicator
from lockstep_runtime.layers.batch import Batch
from lockstep_runtime.layers.cache import LayerCache, PagedShape
from lockstep_runtime.layers.linear import ColumnLinear, RowLinear
from lockstep_runtime.layers.norm import rms_normalize
from lockstep_runtime.layers.placement import Placement
from lockstep_runtime.layers.rotary import Rotation, rotate_
from lockstep_runtime.layers.weight import PlainWeight
from lockstep_runtime.weights.sharding import RankInfo, TensorSlice, head_range, head_slice, replicated
from lockstep_runtime.weights.weight import Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedAttentionShape:
    """Of the whole model."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    bias: bool
    epsilon: float  # of the norms of queries and keys

    def paged(self, shard: RankInfo) -> PagedShape:
        """What a rank keeps of every token."""
        first, last = head_range(self.kv_heads, shard)
        sharing = self.heads // shard.size // (last - first)
        return PagedShape(kv_heads=last - first, head_dim=self.head_dim, sharing=sharing)

    def inputs(self, prefix: str, kind: str, shard: RankInfo) -> tuple[TensorSlice, ...]:
        """Slices of the `weight` or the `bias` of q, k and v; a head's queries and its gate lie side by side."""
        columns = (self.hidden,) if kind == "weight" else ()
        return tuple(
            head_slice(f"{prefix}.{name}_proj.{kind}", count * width, *columns, count=count, shard=shard)
            for name, count, width in (
                ("q", self.heads, 2 * self.head_dim),
                ("k", self.kv_heads, self.head_dim),
                ("v", self.kv_heads, self.head_dim),
            )
        )


class GatedAttention:
    """Every head of q and k is normed (zero-centred weights) before its first part is rotated."""

    def __init__(self, prefix: str, shape: GatedAttentionShape, shard: RankInfo, placement: Placement) -> None:
        bias = shape.inputs(prefix, "bias", shard) if shape.bias else ()
        self._qkv = ColumnLinear(*shape.inputs(prefix, "weight", shard), bias=bias, placement=placement)
        outputs = (shape.hidden, shape.heads * shape.head_dim)
        self._out = RowLinear(
            head_slice(f"{prefix}.o_proj.weight", *outputs, count=shape.heads, shard=shard, dim=1),
            replicated(f"{prefix}.o_proj.bias", shape.hidden) if shape.bias else None,
            placement=placement,
        )
        self._q_norm, self._k_norm = (
            PlainWeight(
                replicated(f"{prefix}.{name}_norm.weight", shape.head_dim), placement=placement, dtype=torch.float32
            )
            for name in ("q", "k")
        )
        self._epsilon, self._width = shape.epsilon, shape.head_dim
        self.memory = shape.paged(shard)
        self._heads, self._kv_heads = shape.heads // shard.size, self.memory.kv_heads
        self._scales: Tensor  # [heads + kv heads, head_dim]: of both norms, to apply them at once

    def weights(self) -> list[Weight]:
        return [self._q_norm, self._k_norm, *self._qkv.weights(), *self._out.weights()]

    def loaded(self) -> None:
        q, k = 1.0 + self._q_norm.data, 1.0 + self._k_norm.data
        self._scales = torch.cat((q.expand(self._heads, -1), k.expand(self._kv_heads, -1)))

    def __call__(self, x: Tensor, cache: LayerCache, batch: Batch, rotation: Rotation, group: Communicator) -> Tensor:
        """x: [tokens, hidden] -> the same; the rotation is as wide as what is rotated."""
        tokens, heads = x.shape[0], self._heads
        rows = self._qkv(x).view(tokens, -1, self._width)
        queries, gates = rows[:, : 2 * heads].view(tokens, heads, 2, self._width).unbind(2)
        keys, values = rows[:, 2 * heads :].chunk(2, 1)
        both = rms_normalize(torch.cat((queries, keys), 1).float(), self._epsilon, self._scales).to(x.dtype)
        rotate_(both[..., : rotation[0].shape[-1]], *rotation)
        cache.write(batch.slots, both[:, heads:], values)
        attended = batch.attend(both[:, :heads], cache)
        return self._out(attended * gates.sigmoid().reshape(tokens, -1), group)
