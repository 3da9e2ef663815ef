"""What one rank's layers remember of the sequences: keys and values in blocks of tokens, and recurrent states in slots.

A token's keys and values are written once and stay. A recurrent state changes with every token, so it is read from one
slot and written to another: a step that is repeated reads what it read before. Slot 0 holds zeros, which is what a
sequence begins with, and is never written.
"""

from __future__ import annotations

import math
import mmap
import os
import secrets
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import torch
from torch import Tensor

from lockstep_runtime.layers.placement import Placement
from lockstep_runtime.protocol.step import PROBE_STATE_SLOTS, SequenceSlice

BLOCK_SIZE = 32  # tokens: small enough to waste little, large enough to keep block tables short
ALIGNMENT = 64  # bytes: a line of a CPU's cache
HEAD_BYTES = 16 * mmap.PAGESIZE  # of a `CacheMemory`, before the cache: what is in it, as JSON


_Page = TypeVar("_Page", bound=msgspec.Struct)


class PagedShape(msgspec.Struct, frozen=True, kw_only=True, tag="paged"):
    """Keys and values of every token; of one rank."""

    kv_heads: int
    head_dim: int
    sharing: int  # query heads that share a kv head


class StatePart(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor of a recurrent state."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def type(self) -> torch.dtype:
        found = getattr(torch, self.dtype)
        if not isinstance(found, torch.dtype):
            raise TypeError(f"{self.dtype} is no type of torch")
        return found


class StateShape(msgspec.Struct, frozen=True, kw_only=True, tag="state"):
    """A state of fixed size that every token changes; of one rank."""

    parts: tuple[StatePart, ...]


LayerMemory = PagedShape | StateShape


class CacheShape(msgspec.Struct, frozen=True, kw_only=True):
    """Of one rank, layer by layer."""

    layers: tuple[LayerMemory, ...]

    def nbytes(self, dtype: torch.dtype, size: CacheSize) -> int:
        """`dtype`: of keys and values."""
        return sum(tensor.nbytes for layer in self.layers for tensor in _tensors(layer, dtype, size))

    def block_bytes(self, dtype: torch.dtype) -> int:
        """Of one block of tokens in all layers."""
        return self.nbytes(dtype, CacheSize(blocks=1))

    @property
    def slot_bytes(self) -> int:
        """Of one state of a sequence in all layers."""
        return self.nbytes(torch.float32, CacheSize(blocks=0, state_slots=1))


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One of a cache's tensors, by its place in the memory."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """With what is left free behind it, so that the next one is aligned, whatever its type."""
        return -(-math.prod(self.shape) * self.dtype.itemsize // ALIGNMENT) * ALIGNMENT

    def within(self, raw: Tensor, at: int) -> Tensor:
        return raw[at : at + math.prod(self.shape) * self.dtype.itemsize].view(self.dtype).view(self.shape)


def _tensors(layer: LayerMemory, dtype: torch.dtype, size: CacheSize) -> list[_Tensor]:
    if isinstance(layer, StateShape):
        return [_Tensor(part.name, part.type, (size.state_slots, *part.shape)) for part in layer.parts]
    shape = (size.blocks * BLOCK_SIZE, layer.kv_heads, layer.head_dim)
    return [_Tensor("keys", dtype, shape), _Tensor("values", dtype, shape)]


class CacheSize(msgspec.Struct, frozen=True, kw_only=True):
    """How much of everything; the probe's included."""

    blocks: int
    state_slots: int = 0


@dataclass(frozen=True, slots=True)
class LayerCache:
    """[slots, kv_heads, head_dim] each: a slot is a token's."""

    keys: Tensor
    values: Tensor

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put one key and value per token, [tokens, kv_heads, head_dim], into the tokens' slots."""
        self.keys.index_copy_(0, slots, keys)
        self.values.index_copy_(0, slots, values)


@dataclass(frozen=True, slots=True)
class StateCache:
    """`parts[name]` is [state slots, *shape]: a slot is a sequence's, before or after a step."""

    parts: Mapping[str, Tensor]

    def read(self, name: str, slots: Tensor) -> Tensor:
        """slots: [sequences] -> [sequences, *shape], a copy."""
        return self.parts[name].index_select(0, slots)

    def write(self, name: str, slots: Tensor, states: Tensor) -> None:
        """states: [sequences, *shape]."""
        part = self.parts[name]
        if part.is_cpu:  # where rows as large as these are copied one by one in two thirds of the time
            torch._foreach_copy_([part[slot] for slot in slots.tolist()], states.unbind())
        else:
            part.index_copy_(0, slots, states)


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """What stands in a `CacheMemory`, as JSON in its head."""

    name: str
    shape: CacheShape
    dtype: str
    size: CacheSize


class Footprint(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank on a GPU had of its device, as JSON in a `CacheMemory`: its cache itself ends with its process."""

    device_bytes: int  # weights and cache
    size: CacheSize
    block_bytes: int


class CacheMemory:
    """Memory in which a rank's cache outlives the process that wrote it, if the descriptor (memfd) is held elsewhere.

    Its pages are zero until they are first touched: a cache of any size is there at once, and a rank that takes part in
    a rebuild waits for nothing.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        if descriptor is None:
            descriptor = os.memfd_create("lockstep-cache")
            weakref.finalize(self, os.close, descriptor)  # nobody else holds it; what is mapped stays
        self._descriptor = descriptor

    def held(self, shape: CacheShape, dtype: torch.dtype) -> Held | None:
        """What a cache of this shape has left here."""
        found = self._head(Held)
        return found if found is not None and (found.shape, found.dtype) == (shape, str(dtype)) else None

    def footprint(self) -> Footprint | None:
        """What this rank's process before this one had of its GPU."""
        return self._head(Footprint)

    def leave_footprint(self, footprint: Footprint) -> None:
        """For this rank's next process."""
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, msgspec.json.encode(footprint), 0)

    def _head(self, kind: type[_Page]) -> _Page | None:
        try:
            return msgspec.json.decode(os.pread(self._descriptor, HEAD_BYTES, 0).rstrip(b"\0"), type=kind)
        except msgspec.DecodeError:
            return None

    def forget(self) -> None:
        """What stands here is of no use."""
        os.ftruncate(self._descriptor, 0)

    def open(self, shape: CacheShape, dtype: torch.dtype, size: CacheSize) -> tuple[str, Tensor]:
        """The cache that is here, or a new one in its place: its name, and all of its bytes."""
        held = self.held(shape, dtype)
        if held is None or held.size != size:
            held = Held(name=_new_name(), shape=shape, dtype=str(dtype), size=size)
            os.ftruncate(self._descriptor, 0)
            first = msgspec.json.encode(held)
            os.ftruncate(self._descriptor, HEAD_BYTES + shape.nbytes(dtype, size))
            os.pwrite(self._descriptor, first, 0)
        pages = mmap.mmap(self._descriptor, 0)
        pages.madvise(mmap.MADV_HUGEPAGE)
        return held.name, torch.frombuffer(pages, dtype=torch.uint8, offset=HEAD_BYTES)


class KVCache:
    """`layers[i]` is what layer i remembers; `paged` and `states` are those of each kind, in the same order.

    `name` stands for what is written to it. Where the memory is a CPU's, a later cache of the same shape and size in
    the same `memory` has the same name and contents.
    """

    def __init__(
        self, shape: CacheShape, size: CacheSize, placement: Placement, memory: CacheMemory | None = None
    ) -> None:
        self._shape, self._placement, self._memory = shape, placement, memory or CacheMemory()
        self.size = size
        self.nbytes = shape.nbytes(placement.activation, size)
        if placement.device.type == "cpu":
            self.name, raw = self._memory.open(shape, placement.activation, size)
        else:
            self.name, raw = _new_name(), torch.zeros(self.nbytes, dtype=torch.uint8, device=placement.device)
        self._lay_out(raw)

    @property
    def blocks(self) -> int:
        return self.size.blocks

    def _lay_out(self, raw: Tensor) -> None:
        self._raw = raw
        self.layers: list[LayerCache | StateCache] = []
        at = 0
        for layer in self._shape.layers:
            found: dict[str, Tensor] = {}
            for tensor in _tensors(layer, self._placement.activation, self.size):
                found[tensor.name] = tensor.within(raw, at)
                at += tensor.nbytes
            self.layers.append(StateCache(found) if isinstance(layer, StateShape) else LayerCache(**found))
        self.paged = [layer for layer in self.layers if isinstance(layer, LayerCache)]
        self.states = [layer for layer in self.layers if isinstance(layer, StateCache)]

    def holds(self, sequence: SequenceSlice) -> bool:
        """Whether it is large enough to hold what is told of the sequence."""
        return max(sequence.blocks) < self.size.blocks and sequence.state.read < max(1, self.size.state_slots)

    def renew(self) -> None:
        """Zeros, under another name, in the same place: a GPU has no room for two."""
        if self._placement.device.type == "cpu":
            self._memory.forget()  # which is quicker than to write them
            self.name, raw = self._memory.open(self._shape, self._placement.activation, self.size)
            self._lay_out(raw)
        else:
            self.name = _new_name()
            self._raw.zero_()

    def fill_for_probe(self) -> None:
        """With what the probe finds in the last block and the last slot but one: numbers from -1 to 1, the same every
        time."""
        for layer in self.layers:
            if isinstance(layer, LayerCache):
                _fill(layer.keys[-BLOCK_SIZE:])
                _fill(layer.values[-BLOCK_SIZE:])
            else:
                for part in layer.parts.values():
                    _fill(part[-PROBE_STATE_SLOTS])


def _fill(part: Tensor) -> None:
    part.copy_(torch.arange(part.numel(), device=part.device).sin().view(part.shape))


def _new_name() -> str:
    return secrets.token_hex(8)
