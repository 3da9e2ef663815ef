"""The KV cache of one rank: blocks of slots, one slot per token and layer."""

from __future__ import annotations

import math
import mmap
import os
import secrets
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import torch
from torch import Tensor

from lockstep_runtime.layers.placement import Placement
from lockstep_runtime.layers.prefill_attention import Prefill

BLOCK_SIZE = 32  # tokens: small enough to waste little, large enough to keep block tables short


_Page = TypeVar("_Page", bound=msgspec.Struct)


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
    prefill: Prefill = Prefill.MASKED

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


class Footprint(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank on a GPU had of its device, as JSON in a `CacheMemory`: its cache itself ends with its process."""

    device_bytes: int  # weights and cache
    blocks: int
    block_bytes: int


class CacheMemory:
    """Memory in which a rank's cache outlives the process that wrote it, if the descriptor (memfd) is held elsewhere.

    Its pages are zero until they are first touched: a cache of any size is there at once, and a rank that takes part in
    a rebuild waits for nothing.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self._descriptor = os.memfd_create("lockstep-cache") if descriptor is None else descriptor

    def held(self, shape: CacheShape, dtype: torch.dtype) -> Held | None:
        """What a cache of this shape has left here."""
        found = self._first_page(Held)
        return found if found is not None and (found.shape, found.dtype) == (shape, str(dtype)) else None

    def footprint(self) -> Footprint | None:
        """What this rank's process before this one had of its GPU."""
        return self._first_page(Footprint)

    def leave_footprint(self, footprint: Footprint) -> None:
        """For this rank's next process."""
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, msgspec.json.encode(footprint), 0)

    def _first_page(self, kind: type[_Page]) -> _Page | None:
        try:
            return msgspec.json.decode(os.pread(self._descriptor, mmap.PAGESIZE, 0).rstrip(b"\0"), type=kind)
        except msgspec.DecodeError:
            return None

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

    def __init__(
        self, shape: CacheShape, blocks: int, placement: Placement, memory: CacheMemory | None = None,
        prefill: Prefill = Prefill.MASKED,
    ) -> None:  # fmt: skip
        self._shape, self._placement, self._memory = shape, placement, memory or CacheMemory()
        self._prefill = prefill
        self.blocks = blocks
        size = (2, shape.layers, blocks * BLOCK_SIZE, shape.kv_heads, shape.head_dim)
        dtype, device = placement.activation, placement.device
        if device.type == "cpu":
            self.name, numbers = self._memory.open(shape, dtype, blocks)
        else:
            self.name, numbers = _new_name(), torch.zeros(math.prod(size), dtype=dtype, device=device)
        self._lay_out(numbers.view(size))
        self.nbytes = numbers.nbytes

    def _lay_out(self, numbers: Tensor) -> None:
        self._numbers = numbers
        self.layers = [LayerCache(keys, values, self._prefill) for keys, values in zip(*numbers, strict=True)]

    def renew(self) -> None:
        """Zeros, under another name, in the same place: a GPU has no room for two."""
        if self._placement.device.type == "cpu":
            self._memory.forget()  # which is quicker than to write them
            self.name, numbers = self._memory.open(self._shape, self._placement.activation, self.blocks)
            self._lay_out(numbers.view(self._numbers.shape))
        else:
            self.name = _new_name()
            self._numbers.zero_()

    def fill_last_block(self) -> None:
        """With what the probe finds there: numbers from -1 to 1, the same every time."""
        last = self._numbers[:, :, -BLOCK_SIZE:]
        one = last[0, 0]
        last.copy_(torch.arange(one.numel(), device=one.device).sin().view(one.shape))


def _new_name() -> str:
    return secrets.token_hex(8)
