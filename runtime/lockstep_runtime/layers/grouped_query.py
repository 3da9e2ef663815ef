"""Grouped-query attention (https://arxiv.org/abs/2305.13245) with rotary positions, split over ranks by heads."""

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
from lockstep_runtime.weights.sharding import RankInfo, head_range, head_slice, replicated
from lockstep_runtime.weights.weight import Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    bias: bool = False  # of q, k and v
    out_bias: bool = False
    norm_epsilon: float | None = None  # every head of q and k is normed before it is rotated; None: none is


class GroupedQueryAttention:
    """`prefix` is that of the block, such as `model.layers.3.self_attn`."""

    def __init__(self, prefix: str, shape: AttentionShape, shard: RankInfo, placement: Placement) -> None:
        hidden, width = shape.hidden, shape.head_dim
        counts = {"q_proj": shape.heads, "k_proj": shape.kv_heads, "v_proj": shape.kv_heads}
        self._qkv = ColumnLinear(
            *(
                head_slice(f"{prefix}.{name}.weight", n * width, hidden, count=n, shard=shard)
                for name, n in counts.items()
            ),
            bias=tuple(
                head_slice(f"{prefix}.{name}.bias", n * width, count=n, shard=shard) for name, n in counts.items()
            )
            if shape.bias
            else (),
            placement=placement,
        )
        self._out = RowLinear(
            head_slice(f"{prefix}.o_proj.weight", hidden, shape.heads * width, count=shape.heads, shard=shard, dim=1),
            replicated(f"{prefix}.o_proj.bias", hidden) if shape.out_bias else None,
            placement=placement,
        )
        first, last = head_range(shape.kv_heads, shard)
        q_heads, kv_heads = shape.heads // shard.size, last - first
        self.memory = PagedShape(kv_heads=kv_heads, head_dim=width, sharing=q_heads // kv_heads)
        self._q_heads, self._kv_heads, self._turned = q_heads, kv_heads, q_heads + kv_heads
        self._norm = HeadNorm(prefix, shape, shape.norm_epsilon, placement) if shape.norm_epsilon is not None else None

    def weights(self) -> list[Weight]:
        norms = self._norm.weights() if self._norm else []
        return [*norms, *self._qkv.weights(), *self._out.weights()]

    def loaded(self) -> None:
        if self._norm:
            self._norm.spread(self._q_heads, self._kv_heads)

    def __call__(self, x: Tensor, cache: LayerCache, batch: Batch, rotation: Rotation, group: Communicator) -> Tensor:
        """x: [tokens, hidden] -> the same on every rank."""
        qkv = self._qkv(x).view(x.shape[0], -1, self.memory.head_dim)
        turned = qkv[:, : self._turned]  # q and k
        if self._norm:
            turned = self._norm(turned)
        rotate_(turned, *rotation)
        cache.write(batch.slots, turned[:, self._q_heads :], qkv[:, self._turned :])
        return self._out(batch.attend(turned[:, : self._q_heads], cache), group)


class HeadNorm:
    """The norms of q and of k, applied in one product."""

    def __init__(self, prefix: str, shape: AttentionShape, epsilon: float, placement: Placement) -> None:
        self._q, self._k = (
            PlainWeight(replicated(f"{prefix}.{name}.weight", shape.head_dim), placement=placement)
            for name in ("q_norm", "k_norm")
        )
        self._epsilon = epsilon
        self._spread: Tensor  # [q heads + kv heads, head_dim]

    def weights(self) -> list[Weight]:
        return [self._q, self._k]

    def spread(self, q_heads: int, kv_heads: int) -> None:
        """Over this rank's heads, once the weights are here."""
        self._spread = torch.cat((self._q.data.expand(q_heads, -1), self._k.data.expand(kv_heads, -1)))

    def __call__(self, heads: Tensor) -> Tensor:
        """heads: [tokens, q heads + kv heads, head_dim]."""
        return rms_normalize(heads, self._epsilon, self._spread)
