"""The KV cache of one rank: blocks of slots, one slot per token and layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lockstep_runtime.layers.placement import Placement

BLOCK_SIZE = 32  # tokens: small enough to waste little, large enough to keep block tables short


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """Of one rank."""

    layers: int
    kv_heads: int
    head_dim: int

    def block_bytes(self, dtype: torch.dtype) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * BLOCK_SIZE * dtype.itemsize


class KVCache:
    """`layers[i]` is [slots, 2, kv_heads, head_dim]: keys at 0, values at 1, so that a token is written in one go."""

    def __init__(self, shape: CacheShape, blocks: int, placement: Placement) -> None:
        size = (blocks * BLOCK_SIZE, 2, shape.kv_heads, shape.head_dim)
        self.layers: list[Tensor] = [
            torch.zeros(size, dtype=placement.activation, device=placement.device) for _ in range(shape.layers)
        ]
        self.blocks = blocks

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)
