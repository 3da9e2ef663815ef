"""The KV cache of one rank: blocks of slots, one slot per token and layer."""

from __future__ import annotations

import math
import mmap
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


@dataclass(frozen=True, slots=True)
class LayerCache:
    """[slots, kv_heads, head_dim] each."""

    keys: Tensor
    values: Tensor

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put one key and value per token, [tokens, kv_heads, head_dim], into the tokens' slots."""
        self.keys.index_copy_(0, slots, keys)
        self.values.index_copy_(0, slots, values)


class KVCache:
    """`layers[i]` is the layer's keys and values, each [slots, kv_heads, head_dim]."""

    def __init__(self, shape: CacheShape, blocks: int, placement: Placement) -> None:
        size = (blocks * BLOCK_SIZE, shape.kv_heads, shape.head_dim)
        self.layers = [LayerCache(_zeros(size, placement), _zeros(size, placement)) for _ in range(shape.layers)]
        self.blocks = blocks

    @property
    def nbytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)


def _zeros(size: tuple[int, ...], placement: Placement) -> Tensor:
    """On the CPU fresh pages of the kernel's, which are zero when they are first touched: a cache of any size is there
    at once, and a rank that takes part in a rebuild waits for nothing."""
    if placement.device.type != "cpu":
        return torch.zeros(size, dtype=placement.activation, device=placement.device)
    pages = mmap.mmap(-1, math.prod(size) * placement.activation.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=placement.activation).view(size)
