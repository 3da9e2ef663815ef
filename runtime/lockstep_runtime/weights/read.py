"""Safetensors, read by the slice: parse the header, then `pread` a rank's bytes straight to where they belong.

The format (https://huggingface.co/docs/safetensors): 8 bytes little-endian length, a JSON header, then the tensors'
bytes, row-major. A cut by rows is one contiguous range; a cut by columns is one range per row. Nothing else is read,
and nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lockstep_runtime.weights.errors import ModelError
from lockstep_runtime.weights.plan import Cut, Rows, rows_of

MAX_HEADER_BYTES: Final = 100_000_000  # the format's own bound
STAGING_BYTES: Final = 4 * 1024 * 1024  # for tensors that are converted on the way
INDEX: Final = "model.safetensors.index.json"
DTYPES: Final[Mapping[str, torch.dtype]] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file


class Checkpoint:
    """All tensors of a model directory. Reads count in `bytes_read`; `progress` is told of each."""

    def __init__(self, directory: Path, progress: Callable[[int], None] = lambda _: None) -> None:
        self.directory = directory
        self.bytes_read = 0
        self._progress = progress
        self._descriptors: dict[Path, int] = {}
        self._staging: Tensor | None = None
        self._entries = {name: entry for file in _files(directory) for name, entry in read_header(file).items()}

    def close(self) -> None:
        self._staging = None
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._entries

    def find(self, cut: Cut) -> Entry:
        """The cut's tensor, checked.

        Raises:
            ModelError: it is missing or has another shape than the model's configuration implies.
        """
        entry = self._entries.get(cut.tensor)
        if entry is None:
            raise ModelError(f"the tensor {cut.tensor} is missing from {self.directory}")
        if entry.shape != cut.shape:
            raise ModelError(
                f"the tensor {cut.tensor} in {entry.file.name} has shape {list(entry.shape)}; "
                f"config.json implies {list(cut.shape)}"
            )
        return entry

    def nbytes(self, cut: Cut) -> int:
        """How many bytes of storage the cut is."""
        return math.prod(cut.local_shape) * self.find(cut).dtype.itemsize

    def read(self, cuts: tuple[Cut, ...], start: int, stop: int, out: Tensor) -> None:
        """Fill `out` (contiguous, on the CPU, any float type) with rows [start, stop) of the stacked cuts."""
        for rows in rows_of(cuts, start, stop):
            entry = self.find(rows.cut)
            target = out[rows.at : rows.at + rows.stop - rows.start]
            if entry.dtype == out.dtype:
                self._read_rows(entry, rows, target)
            else:
                self._read_converted(entry, rows, target)

    def rows(self, cut: Cut) -> StoredRows:
        """The cut's rows, left where they are and read when asked for."""
        entry = self.find(cut)
        row_bytes = math.prod(cut.shape[1:]) * entry.dtype.itemsize
        descriptor = os.dup(self._open(entry.file))
        return StoredRows(entry, descriptor, entry.offset + cut.start * row_bytes, cut.rows, cut.shape[1])

    def _read_converted(self, entry: Entry, rows: Rows, out: Tensor) -> None:
        row_bytes = math.prod(rows.cut.local_shape[1:]) * entry.dtype.itemsize
        at_once = max(1, STAGING_BYTES // row_bytes)
        for first in range(rows.start, rows.stop, at_once):
            last = min(first + at_once, rows.stop)
            staging = self._stage((last - first) * row_bytes).view(entry.dtype).view(last - first, *out.shape[1:])
            self._read_rows(entry, Rows(rows.cut, first, last, 0), staging)
            out[first - rows.start : last - rows.start].copy_(staging)

    def _stage(self, size: int) -> Tensor:
        if self._staging is None or self._staging.numel() < size:
            self._staging = torch.empty(max(size, STAGING_BYTES), dtype=torch.uint8)
        return self._staging[:size]

    def _read_rows(self, entry: Entry, rows: Rows, out: Tensor) -> None:
        """Rows [start, stop) of the cut, in the tensor's own dtype."""
        buffer = out.view(torch.uint8).reshape(-1).numpy().data
        cut, descriptor = rows.cut, self._open(entry.file)
        whole_row = math.prod(cut.shape[1:]) * entry.dtype.itemsize
        if cut.dim == 0:
            _fill(entry, descriptor, buffer, entry.offset + (cut.start + rows.start) * whole_row)
        else:
            inner = math.prod(cut.shape[2:]) * entry.dtype.itemsize
            part = (cut.stop - cut.start) * inner
            offset = entry.offset + rows.start * whole_row + cut.start * inner
            for row in range(rows.stop - rows.start):
                _fill(entry, descriptor, buffer[row * part : (row + 1) * part], offset + row * whole_row)
        self.bytes_read += len(buffer)
        self._progress(len(buffer))

    def _open(self, file: Path) -> int:
        if file not in self._descriptors:
            self._descriptors[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        return self._descriptors[file]


class StoredRows:
    """Rows of a tensor that stay in the file; its descriptor is held open, so the file may be unlinked or replaced."""

    def __init__(self, entry: Entry, descriptor: int, offset: int, rows: int, columns: int) -> None:
        self._entry, self._descriptor, self._offset = entry, descriptor, offset
        self._rows, self._columns = rows, columns

    def __del__(self) -> None:
        os.close(self._descriptor)

    def read(self, indices: list[int]) -> Tensor:
        """[len(indices), columns] in the file's type.

        Raises:
            ModelError: the file can't be read (any more).
            IndexError: no such row.
        """
        out = torch.empty(len(indices), self._columns, dtype=self._entry.dtype)
        buffer = out.view(torch.uint8).reshape(-1).numpy().data
        size = self._columns * self._entry.dtype.itemsize
        for place, index in enumerate(indices):
            if not 0 <= index < self._rows:
                raise IndexError(f"row {index} of {self._rows}")
            _fill(self._entry, self._descriptor, buffer[place * size : (place + 1) * size], self._offset + index * size)
        return out


def _fill(entry: Entry, descriptor: int, buffer: memoryview, offset: int) -> None:
    done = 0
    while done < len(buffer):
        try:
            got = os.preadv(descriptor, [buffer[done:]], offset + done)
        except OSError as error:
            raise ModelError(f"{entry.file} can't be read: {error}") from error
        if got == 0:
            raise ModelError(f"{entry.file} is truncated: it ends at byte {offset + done}, within a tensor")
        done += got


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file.

    Raises:
        ModelError: it is no safetensors file, or shorter than its header says.
    """
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= MAX_HEADER_BYTES:
                raise ModelError(f"{file} is no safetensors file: it gives {length} bytes as its header's length")
            if 8 + length > size:
                raise ModelError(f"{file} is truncated: {size} bytes, but its header alone takes {8 + length}")
            header = json.loads(stream.read(length))
    except FileNotFoundError:
        raise ModelError(f"{file} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} is no readable safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise ModelError(f"{file} is no safetensors file: its header is not a JSON object")
    return {name: _entry(file, name, info, 8 + length, size) for name, info in header.items() if name != "__metadata__"}


def _entry(file: Path, name: str, info: Any, base: int, size: int) -> Entry:
    try:
        dtype, shape = str(info["dtype"]), tuple(int(n) for n in info["shape"])
        begin, end = (int(n) for n in info["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise ModelError(f"{file}: the header's entry of {name} is malformed") from None
    if dtype not in DTYPES:
        raise ModelError(f"{file}: {name} has the type {dtype}; Lockstep reads {', '.join(DTYPES)}")
    if min((0, begin, *shape)) < 0 or end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ModelError(f"{file}: {name} of shape {list(shape)} can't take up bytes {begin} to {end}")
    if base + end > size:
        raise ModelError(f"{file} is truncated: {size} bytes, but {name} would end at byte {base + end}")
    return Entry(file, DTYPES[dtype], shape, base + begin)


def _files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if index.exists():
        return [directory / name for name in _indexed(index)]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{directory} holds no safetensors file")
    return files


def _indexed(index: Path) -> list[str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index} is no index of safetensors files: {error}") from error
    for name in names:
        if Path(name).name != name:
            raise ModelError(f"{index} names the file {name}, which is not in the model's own directory")
    return names
