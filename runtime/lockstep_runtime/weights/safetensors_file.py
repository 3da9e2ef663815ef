"""A safetensors file's header: which tensors there are, and where (https://huggingface.co/docs/safetensors).

The format: 8 bytes little-endian length, a JSON header, then the tensors' bytes, row-major.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.sources.files import LFS_POINTER, lfs_pointer, unreadable

MAX_HEADER_BYTES: Final = 100_000_000  # the format's own bound
DTYPES: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies, of a type that can be computed with."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file


@dataclass(frozen=True, slots=True)
class Unread:
    """A tensor of another type; an error only if it is needed."""

    file: Path
    stored: str  # the type's name in the file
    shape: tuple[int, ...]


def read_header(file: Path) -> dict[str, Entry | Unread]:
    """The tensors of one safetensors file.

    Raises:
        ModelError: it is no safetensors file, or shorter than its header says.
    """
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            _check_start(file, stream.read(len(LFS_POINTER)), size)
            stream.seek(0)
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= MAX_HEADER_BYTES:
                raise ModelError(f"{file} is no safetensors file: it gives {length} bytes as its header's length")
            if 8 + length > size:
                raise ModelError(f"{file} is truncated: {size} bytes, but its header alone takes {8 + length}")
            header = json.loads(stream.read(length))
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise ModelError(unreadable(file, error)) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} is no readable safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise ModelError(f"{file} is no safetensors file: its header is not a JSON object")
    return {name: _entry(file, name, info, 8 + length, size) for name, info in header.items() if name != "__metadata__"}


def _check_start(file: Path, start: bytes, size: int) -> None:
    if not size:
        raise ModelError(f"{file} is empty: its download or copy was cut short; fetch it again")
    if start.startswith(LFS_POINTER[: len(start)]) and len(start) == len(LFS_POINTER):
        raise ModelError(lfs_pointer(file))


def _entry(file: Path, name: str, info: Any, base: int, size: int) -> Entry | Unread:
    try:
        dtype, shape = str(info["dtype"]), tuple(int(n) for n in info["shape"])
        begin, end = (int(n) for n in info["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise ModelError(f"{file}: the header's entry of {name} is malformed") from None
    if base + end > size:
        raise ModelError(f"{file} is truncated: {size} bytes, but {name} would end at byte {base + end}")
    if dtype not in DTYPES:
        return Unread(file, dtype, shape)
    if min((0, begin, *shape)) < 0 or end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ModelError(f"{file}: {name} of shape {list(shape)} can't take up bytes {begin} to {end}")
    return Entry(file, DTYPES[dtype], shape, base + begin)
