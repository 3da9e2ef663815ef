"""A rank's own tensors, converted and laid out, in one file on tmpfs that outlives the rank.

On a CPU the rank's parameters are this file, mapped privately, so that a stray write damages neither the file nor the
next process; matrices that are packed, and those of a GPU, are made from it. A rank that is started again reads neither
weights nor config.json from the checkpoint: it gets what the other ranks of its group have, whatever has become of the
checkpoint since.

Layout: 8 bytes of magic, 8 bytes little-endian length and 8 bytes checksum of the header, the header (JSON), then the
tensors, each at a multiple of 64 bytes. The file is written under another name and renamed when it is whole.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import math
import mmap
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
from torch import Tensor

from lockstep_runtime.host.memory import file_bytes, mebibytes
from lockstep_runtime.weights.checksum import checksum
from lockstep_runtime.weights.parallel_map import in_threads
from lockstep_runtime.weights.sharding import TensorSlice

logger = logging.getLogger(__name__)

MAGIC: Final = b"LSWEIGH1"
ALIGNMENT: Final = 64  # what torch's own allocator gives
_PREFIX: Final = struct.Struct("<8sQ8s")
_UNKNOWN: Final = "0" * 16


class CacheError(Exception):
    """The file can't be used; the message says why. It is made anew from the checkpoint."""


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Of what the slices are, and for whom."""

    model: str
    revision: str | None
    dtype: str
    size: int
    rank: int


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """A stack of slices in one type: what one or several of a rank's tensors are made from."""

    slices: tuple[TensorSlice, ...]
    dtype: str  # torch's name without the prefix

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(tensor_slice.rows for tensor_slice in self.slices), *self.slices[0].local_shape[1:])


class CachedTensor(msgspec.Struct, frozen=True, kw_only=True):
    wanted: Wanted
    offset: int
    checksum: str = _UNKNOWN

    @property
    def nbytes(self) -> int:
        return math.prod(self.wanted.shape) * _dtype(self.wanted.dtype).itemsize


class Header(msgspec.Struct, frozen=True, kw_only=True):
    identity: Identity
    settings: dict[str, Any]  # config.json
    weight_bytes: int  # what the slices take in the checkpoint
    tensors: list[CachedTensor]


class WeightCache:
    """An open file: `tensor` of every stack of slices in it."""

    def __init__(self, path: Path, header: Header, memory: mmap.mmap) -> None:
        self.path, self.header = path, header
        self._memory = memory  # lives as long as any tensor over it
        self._tensors = {one.wanted.slices: one for one in header.tensors}

    @property
    def nbytes(self) -> int:
        return len(self._memory)

    def tensor(self, slices: tuple[TensorSlice, ...], dtype: torch.dtype | None) -> Tensor:
        """The stack, over the file's memory. `dtype` None: whatever it is kept in.

        Raises:
            CacheError: there is no such stack.
        """
        found = self._tensors.get(slices)
        if found is None or (dtype is not None and dtype != _dtype(found.wanted.dtype)):
            raise CacheError(f"{self.path} holds no {slices[0].tensor} as this rank needs it")
        return _over(self._memory, found)

    def checksum(self, slices: tuple[TensorSlice, ...]) -> str:
        return self._tensors[slices].checksum

    def verify(self) -> None:
        """
        Raises:
            CacheError: a tensor is not what was written, and which.
        """
        tensors = self.header.tensors
        for one, found in zip(
            tensors, in_threads(lambda one: checksum(_over(self._memory, one)), tensors), strict=True
        ):
            if found != one.checksum:
                raise CacheError(f"{self.path} is damaged: {one.wanted.slices[0].tensor} is not what was written")


def open_cache(path: Path, identity: Identity) -> WeightCache | None:
    """The rank's file, checked to the last byte; None when there is none. One that is damaged is removed."""
    try:
        cache = _open(path)
        if cache.header.identity != identity:
            raise CacheError(f"{path} holds {cache.header.identity}, not {identity}")
        cache.verify()
    except FileNotFoundError:
        return None
    except (CacheError, OSError) as error:
        logger.warning("the weight cache is discarded: %s", error)
        path.unlink(missing_ok=True)
        return None
    return cache


def _open(path: Path) -> WeightCache:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        size = os.fstat(descriptor).st_size
        if size < _PREFIX.size:
            raise CacheError(f"{path} has {size} bytes")
        memory = mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY)  # MAP_PRIVATE
    finally:
        os.close(descriptor)
    header = _read_header(path, memory)
    if any(one.offset + one.nbytes > size for one in header.tensors):
        raise CacheError(f"{path} is truncated: {size} bytes")
    return WeightCache(path, header, memory)


def _read_header(path: Path, memory: mmap.mmap) -> Header:
    magic, length, digest = _PREFIX.unpack_from(memory, 0)
    raw = memory[_PREFIX.size : _PREFIX.size + length]
    if magic != MAGIC or _digest(raw) != digest:
        raise CacheError(f"{path} is no whole weight cache")
    try:
        return msgspec.json.decode(raw, type=Header)
    except msgspec.MsgspecError as error:
        raise CacheError(f"{path}: {error}") from error


class CacheWriter:
    """A new file, to be filled through `tensors` and then published; nobody sees it before."""

    def __init__(
        self,
        path: Path,
        identity: Identity,
        settings: Mapping[str, Any],
        weight_bytes: int,
        wanted: Iterable[Wanted],
        reserve: int = 0,
    ) -> None:
        """
        Args:
            reserve: bytes that are to be left in the folder: a group runs without this file, not without its exchange.

        Raises:
            OSError: there is no room for it.
        """
        self._path, self._new = path, path.with_name(path.name + ".new")
        self._header = _lay_out(identity, settings, weight_bytes, wanted)
        size = max((one.offset + one.nbytes for one in self._header.tensors), default=_PREFIX.size)
        self._new.unlink(missing_ok=True)  # of a predecessor that was killed
        _check_room(path.parent, size, reserve)
        descriptor = os.open(self._new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)
            _check_room(path.parent, 0, reserve)  # another rank may have taken its part meanwhile
            self._memory = mmap.mmap(descriptor, size)
        except OSError:
            self._new.unlink()
            raise
        finally:
            os.close(descriptor)

    def tensors(self) -> Iterable[tuple[Wanted, Tensor]]:
        """To be filled, each."""
        return ((one.wanted, _over(self._memory, one)) for one in self._header.tensors)

    def publish(self) -> WeightCache:
        """Take the checksums, and give the file its name."""
        sums = in_threads(lambda one: checksum(_over(self._memory, one)), self._header.tensors)
        tensors = [
            msgspec.structs.replace(one, checksum=found) for one, found in zip(self._header.tensors, sums, strict=True)
        ]
        raw = msgspec.json.encode(msgspec.structs.replace(self._header, tensors=tensors))
        self._memory[: _PREFIX.size + len(raw)] = _PREFIX.pack(MAGIC, len(raw), _digest(raw)) + raw
        self._new.rename(self._path)
        return _open(self._path)

    def discard(self) -> None:
        self._new.unlink(missing_ok=True)


def _check_room(folder: Path, size: int, reserve: int) -> None:
    """Before the kernel is asked: at a container's limit it kills who asks.

    Raises:
        OSError: there is not so much room.
    """
    if (room := file_bytes(folder)) < size + reserve:
        needs = f"it takes {mebibytes(size)}, " if size else ""
        kept = f"{mebibytes(reserve)} are kept for the ranks' exchange, and " if reserve else ""
        raise OSError(errno.ENOSPC, f"{needs}{kept}{mebibytes(room)} are left")


def _lay_out(identity: Identity, settings: Mapping[str, Any], weight_bytes: int, wanted: Iterable[Wanted]) -> Header:
    """Where everything goes; checksums and offsets have room in the header before they are known."""
    apart = {one.slices: one for one in wanted}  # what is asked for twice is kept once
    header = Header(
        identity=identity,
        settings=dict(settings),
        weight_bytes=weight_bytes,
        tensors=[CachedTensor(wanted=one, offset=1 << 62) for one in apart.values()],
    )
    at = _PREFIX.size + len(msgspec.json.encode(header))
    tensors = []
    for one in header.tensors:
        at = -(-at // ALIGNMENT) * ALIGNMENT
        tensors.append(msgspec.structs.replace(one, offset=at))
        at += one.nbytes
    return msgspec.structs.replace(header, tensors=tensors)


def _over(memory: mmap.mmap, one: CachedTensor) -> Tensor:
    shape, dtype = one.wanted.shape, _dtype(one.wanted.dtype)
    if not one.nbytes:  # a rank beyond the vocabulary's end
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=one.offset).view(shape)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise CacheError(f"{name} is no type of torch")
    return dtype


def _digest(raw: bytes) -> bytes:
    return hashlib.blake2b(raw, digest_size=8).digest()
