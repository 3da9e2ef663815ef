"""The KV cache of one rank: blocks of slots, one slot per token and layer."""

from __future__ import annotations

import math
import mmap
import os
import secrets
from dataclasses import dataclass

import msgspec
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


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """What stands in a `CacheMemory`, as JSON in its first page."""

    name: str
    shape: CacheShape
    dtype: str
    blocks: int


class CacheMemory:
    """Memory in which a rank's cache outlives the process that wrote it, if the descriptor (memfd) is held elsewhere.

    Its pages are zero until they are first touched: a cache of any size is there at once, and a rank that takes part in
    a rebuild waits for nothing.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self._descriptor = os.memfd_create("lockstep-cache") if descriptor is None else descriptor

    def held(self, shape: CacheShape, dtype: torch.dtype) -> Held | None:
        """What a cache of this shape has left here."""
        try:
            found = msgspec.json.decode(os.pread(self._descriptor, mmap.PAGESIZE, 0).rstrip(b"\0"), type=Held)
        except msgspec.DecodeError:
            return None
        return found if (found.shape, found.dtype) == (shape, str(dtype)) else None

    def forget(self) -> None:
        """What stands here is of no use."""
        os.ftruncate(self._descriptor, 0)

    def open(self, shape: CacheShape, dtype: torch.dtype, blocks: int) -> tuple[str, Tensor]:
        """The cache that is here, or a new one in its place: its name, and all of its numbers."""
        held = self.held(shape, dtype)
        if held is None or held.blocks != blocks:
            held = Held(name=_new_name(), shape=shape, dtype=str(dtype), blocks=blocks)
            os.ftruncate(self._descriptor, 0)
            os.ftruncate(self._descriptor, mmap.PAGESIZE + blocks * shape.block_bytes(dtype))
            os.pwrite(self._descriptor, msgspec.json.encode(held), 0)
        pages = mmap.mmap(self._descriptor, 0)
        pages.madvise(mmap.MADV_HUGEPAGE)
        return held.name, torch.frombuffer(pages, dtype=dtype, offset=mmap.PAGESIZE)


class KVCache:
    """`layers[i]` is the layer's keys and values, each [slots, kv_heads, head_dim].

    `name` stands for what is written to it. Where the memory is a CPU's, a later cache of the same shape and size in
    the same `memory` has the same name and contents.
    """

    def __init__(self, shape: CacheShape, blocks: int, placement: Placement, memory: CacheMemory | None = None) -> None:
        size = (2, shape.layers, blocks * BLOCK_SIZE, shape.kv_heads, shape.head_dim)
        dtype, device = placement.activation, placement.device
        if device.type == "cpu":
            self.name, numbers = (memory or CacheMemory()).open(shape, dtype, blocks)
        else:
            self.name, numbers = _new_name(), torch.zeros(math.prod(size), dtype=dtype, device=device)
        self._numbers = numbers.view(size)
        self.layers = [LayerCache(keys, values) for keys, values in zip(*self._numbers, strict=True)]
        self.blocks = blocks
        self.nbytes = numbers.nbytes

    def fill_last_block(self) -> None:
        """With what the probe finds there: numbers from -1 to 1, the same every time."""
        last = self._numbers[:, :, -BLOCK_SIZE:]
        one = last[0, 0]
        last.copy_(torch.arange(one.numel(), device=one.device).sin().view(one.shape))


def _new_name() -> str:
    return secrets.token_hex(8)
