"""A rank's own tensors, converted and laid out, in one file on tmpfs that outlives the rank.

On a CPU the rank's parameters are this file, mapped privately, so that a stray write damages neither the file nor the
next process; matrices that are packed, and those of a GPU, are made from it. A rank that is started again reads neither
weights nor config.json from the checkpoint: it gets what the other ranks of its group have, whatever has become of the
checkpoint since.

It is a safetensors file, whose `__metadata__` says what it holds, with a checksum of every tensor and of itself. The
library maps it and finds the tensors; it is written here, since the library wants all of them in memory first. Each
tensor is at a multiple of 64 bytes: the format has no holes, so bytes between two are a tensor, too. The file is
written under another name and renamed when it is whole.

Source: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import errno
import hashlib
import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lockstep_runtime.host.memory import file_bytes, mebibytes
from lockstep_runtime.weights.checksum import RunningChecksum, checksum
from lockstep_runtime.weights.parallel_map import in_threads
from lockstep_runtime.weights.safetensors_file import DTYPES
from lockstep_runtime.weights.sharding import TensorSlice
from lockstep_runtime.weights.slice_reader import FileTarget

logger = logging.getLogger(__name__)

NAME_CHARACTERS: Final = 400  # of a stack; a layer's experts as one have a thousand slices
ALIGNMENT: Final = 64  # what torch's own allocator gives
CONTENTS: Final = "lockstep"  # of `__metadata__`: `Contents`, as JSON
DIGEST: Final = "digest"  # of that text
_LENGTH_BYTES: Final = 8  # the file's first, little-endian: how long its header is
_UNKNOWN: Final = "0" * 16
_NAMES: Final[Mapping[torch.dtype, str]] = {dtype: name for name, dtype in DTYPES.items()}


class CacheError(Exception):
    """The file can't be used; the message has the reason. It is written again from the checkpoint."""


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


class Contents(msgspec.Struct, frozen=True, kw_only=True):
    """What the file says of itself."""

    identity: Identity
    settings: dict[str, Any]  # config.json
    weight_bytes: int  # what the slices take in the checkpoint
    checksums: dict[str, str]  # by the tensors' names


class WeightCache:
    """An open file: `tensor` of every stack of slices in it."""

    def __init__(self, path: Path, contents: Contents, file: Any, nbytes: int) -> None:
        self.path, self.contents, self.nbytes = path, contents, nbytes
        self._file = file

    def tensor(self, slices: tuple[TensorSlice, ...], dtype: torch.dtype | None) -> Tensor:
        """The stack, over the file's memory. `dtype` None: whatever it is kept in.

        Raises:
            CacheError: there is no such stack.
        """
        name = _name(slices)
        found = self._get(name) if name in self.contents.checksums else None
        if found is None or (dtype is not None and dtype != found.dtype):
            raise CacheError(f"{self.path} holds no {slices[0].tensor} as this rank needs it")
        return found

    def _get(self, name: str) -> Tensor:
        try:
            found: Tensor = self._file.get_tensor(name)
        except SafetensorError as error:
            raise CacheError(f"{self.path} is damaged: {error}") from error
        return found

    def checksum(self, slices: tuple[TensorSlice, ...]) -> str:
        return self.contents.checksums[_name(slices)]

    def verify(self) -> None:
        """
        Raises:
            CacheError: a tensor is not what was written, and which.
        """
        known = self.contents.checksums
        for name, found in zip(known, in_threads(lambda name: checksum(self._get(name)), list(known)), strict=True):
            if found != known[name]:
                raise CacheError(f"{self.path} is damaged: {name} is not what was written")


def open_cache(path: Path, identity: Identity) -> WeightCache | None:
    """The rank's file, checked to the last byte; None when there is none. One that is damaged is removed."""
    try:
        cache = _open(path)
        if cache.contents.identity != identity:
            raise CacheError(f"{path} holds {cache.contents.identity}, not {identity}")
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
        file: Any = safe_open(f"/proc/self/fd/{descriptor}", framework="pt")  # mapped privately
        return WeightCache(path, _read_contents(file.metadata() or {}), file, os.fstat(descriptor).st_size)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CacheError(f"{path} is no whole weight cache: {error}") from error
    finally:
        os.close(descriptor)


def _read_contents(metadata: Mapping[str, str]) -> Contents:
    """
    Raises:
        KeyError, ValueError: it has none, or not as they were written.
    """
    text = metadata[CONTENTS]
    if metadata[DIGEST] != _digest(text):
        raise ValueError("its description is damaged")
    return msgspec.json.decode(text, type=Contents)


class CacheWriter:
    """A new file, to be filled through `targets` and then published or discarded; nobody sees it before."""

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
        self._wanted = {_name(one.slices): one for one in wanted}  # what is asked for twice is kept once
        self._contents = Contents(
            identity=identity,
            settings=dict(settings),
            weight_bytes=weight_bytes,
            checksums=dict.fromkeys(self._wanted, _UNKNOWN),
        )
        self._places = _lay_out(self._wanted)
        self._base = len(_header(self._contents, self._places))
        size = self._base + max((one.stop for one in self._places.values()), default=0)
        self._new.unlink(missing_ok=True)  # of a predecessor that was killed
        _check_room(path.parent, size, reserve)
        descriptor = os.open(self._new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)
            _check_room(path.parent, 0, reserve)  # another rank may have taken its part meanwhile
        except OSError:
            self._new.unlink()
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        self._targets = {name: self._target(name) for name in self._wanted}

    def targets(self) -> Iterable[tuple[Wanted, FileTarget]]:
        """To be filled, each."""
        return ((one, self._targets[name]) for name, one in self._wanted.items())

    def publish(self) -> WeightCache:
        """Give the file its header, with the checksums of what was written, and its name."""
        sums = {name: target.checksum.hexdigest() for name, target in self._targets.items()}
        os.pwrite(self._descriptor, _header(msgspec.structs.replace(self._contents, checksums=sums), self._places), 0)
        self._new.rename(self._path)
        self.close()
        return _open(self._path)

    def _target(self, name: str) -> FileTarget:
        place, dtype = self._places[name], _dtype(self._wanted[name].dtype)
        summed = RunningChecksum(place.stop - place.start)
        return FileTarget(self._descriptor, self._base + place.start, dtype, summed)

    def discard(self) -> None:
        self._new.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        os.close(self._descriptor)


def _check_room(folder: Path, size: int, reserve: int) -> None:
    """Before the kernel is asked: at a container's limit it kills who asks.

    Raises:
        OSError: there is not so much room.
    """
    if (room := file_bytes(folder)) < size + reserve:
        needs = f"it takes {mebibytes(size)}, " if size else ""
        kept = f"{mebibytes(reserve)} are kept for the ranks' exchange, and " if reserve else ""
        raise OSError(errno.ENOSPC, f"{needs}{kept}{mebibytes(room)} are left")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies, seen from the header's end."""

    dtype: str  # the format's name
    shape: tuple[int, ...]
    start: int
    stop: int


def _lay_out(wanted: Mapping[str, Wanted]) -> dict[str, _Place]:
    """Where everything goes, in order."""
    places: dict[str, _Place] = {}
    at = 0
    for name, one in wanted.items():
        if gap := -at % ALIGNMENT:
            places[f"gap before {name}"] = _Place("U8", (gap,), at, at + gap)
            at += gap
        dtype = _dtype(one.dtype)
        end = at + math.prod(one.shape) * dtype.itemsize
        places[name] = _Place(_NAMES[dtype], one.shape, at, end)
        at = end
    return places


def _header(contents: Contents, places: Mapping[str, _Place]) -> bytes:
    """Its length depends on neither the checksums nor the digest."""
    text = msgspec.json.encode(contents).decode()
    header: dict[str, Any] = {"__metadata__": {CONTENTS: text, DIGEST: _digest(text)}}
    for name, one in places.items():
        header[name] = {"dtype": one.dtype, "shape": one.shape, "data_offsets": [one.start, one.stop]}
    raw = msgspec.json.encode(header)
    raw += b" " * (-(_LENGTH_BYTES + len(raw)) % ALIGNMENT)
    return len(raw).to_bytes(_LENGTH_BYTES, "little") + raw


def _name(slices: tuple[TensorSlice, ...]) -> str:
    """Such as `q.weight[0:512]+k.weight[0:256]`, `o.weight[:, 0:512]`, or `experts.down_proj[7][:, 0:512]`."""
    name = "+".join(map(_slice_name, slices))
    if len(name) <= NAME_CHARACTERS:
        return name
    return f"{_slice_name(slices[0])} and {len(slices) - 1} more, {_digest(name)}"


def _slice_name(one: TensorSlice) -> str:
    index = "" if one.index is None else f"[{one.index}]"
    return f"{one.tensor}{index}[{':, ' * one.dim}{one.start}:{one.stop}]"


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise CacheError(f"{name} is no type of torch")
    return dtype


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
