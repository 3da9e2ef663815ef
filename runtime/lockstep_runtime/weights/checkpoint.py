"""Safetensors, read by the slice: parse the header, then `pread` a rank's bytes straight to where they belong.

The format (https://huggingface.co/docs/safetensors): 8 bytes little-endian length, a JSON header, then the tensors'
bytes, row-major. A slice by rows is one contiguous range; a slice by columns is one range per row. Nothing else is
read, and nothing is ever unpickled.

The format's own library maps the files: of two ranks of a 0.6B model each took as long as here to fill its 596 MB, with
1.4 GB resident at the most instead of 0.58. Here a rank's bytes go where they belong, the mapped weight cache or a
pinned window; they are counted as they come, so that a load that stands still is told from a slow one; and a file that
is cut short while it is read is a sentence, where the library's process dies of SIGBUS.
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

from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.sources.files import LFS_POINTER, lfs_pointer, read_object, unreadable
from lockstep_runtime.sources.model_config import dtype_name
from lockstep_runtime.weights.sharding import Rows, TensorSlice, rows_of

MAX_HEADER_BYTES: Final = 100_000_000  # the format's own bound
STAGING_BYTES: Final = 4 * 1024 * 1024  # for tensors that are converted on the way
INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
DTYPES: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# What a weight's tensors are called where a quantised form takes its place.
_QUANTISED_NAMES: Final = ("qweight", "weight_packed", "weight_quantized", "weight_scale", "SCB", "absmax")


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


class Checkpoint:
    """All tensors of a model directory. Reads count in `bytes_read`; `progress` is called for each."""

    def __init__(self, directory: Path, progress: Callable[[int], None] = lambda _: None) -> None:
        self.directory = directory
        self.bytes_read = 0
        self._progress = progress
        self._descriptors: dict[Path, int] = {}
        self._staging: Tensor | None = None
        self._index = _index(directory)
        files = _files(directory, self._index)
        self._entries = {name: entry for file in files for name, entry in read_header(file).items()}

    def close(self) -> None:
        self._staging = None
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _placed(self, tensor_slice: TensorSlice) -> TensorSlice:
        """The slice itself, or the one that stands for it in this checkpoint."""
        other = tensor_slice.otherwise
        if other is not None and tensor_slice.tensor not in self._entries and other.tensor in self._entries:
            return other
        return tensor_slice

    def find(self, tensor_slice: TensorSlice) -> Entry:
        """The slice's tensor, checked.

        Raises:
            ModelError: it is missing, of a type that is not computed with, or has another shape than the model's
                configuration implies.
        """
        tensor_slice = self._placed(tensor_slice)
        entry = self._entries.get(tensor_slice.tensor)
        if entry is None:
            raise ModelError(self._missing(tensor_slice.tensor))
        if isinstance(entry, Unread):
            raise ModelError(
                f"the tensor {tensor_slice.tensor} in {entry.file.name} has the type {entry.stored}; Lockstep reads "
                f"{', '.join(DTYPES)}: give the model's checkpoint that is not quantised or converted"
            )
        if entry.shape != tensor_slice.shape:
            raise ModelError(
                f"the tensor {tensor_slice.tensor} in {entry.file.name} has shape {list(entry.shape)}; "
                f"config.json implies {list(tensor_slice.shape)}"
            )
        return entry

    def native_dtype(self) -> torch.dtype | None:
        """The type of most of the weights' bytes; None where there are none."""
        taken: dict[torch.dtype, int] = {}
        for entry in self._entries.values():
            if isinstance(entry, Entry):
                taken[entry.dtype] = taken.get(entry.dtype, 0) + math.prod(entry.shape) * entry.dtype.itemsize
        return max(taken, key=lambda dtype: taken[dtype], default=None)

    def _missing(self, tensor: str) -> str:
        words = f"the tensor {tensor} is missing from {self.directory}"
        stem = tensor.rpartition(".")[0]
        if found := next((name for kind in _QUANTISED_NAMES if (name := f"{stem}.{kind}") in self._entries), None):
            return f"{words}, which holds {found}: it is quantised; give the model's checkpoint that is not"
        if file := self._index.get(tensor):
            return f"{words}: {INDEX} places it in {file}, which does not hold it; fetch both files again"
        return words

    def nbytes(self, tensor_slice: TensorSlice) -> int:
        """How many bytes of storage the slice is."""
        return math.prod(tensor_slice.local_shape) * self.find(tensor_slice).dtype.itemsize

    def read(self, slices: tuple[TensorSlice, ...], start: int, stop: int, out: Tensor) -> None:
        """Fill `out` (contiguous, on the CPU, any float type) with rows [start, stop) of the stacked slices.

        Raises:
            ModelError: as `find`; or the file can't be read, or ends within a tensor.
            ValueError: `out` is not contiguous.
        """
        if not out.is_contiguous():
            raise ValueError("only contiguous memory can be read into")
        for rows in rows_of(tuple(map(self._placed, slices)), start, stop):
            entry = self.find(rows.tensor_slice)
            target = out[rows.at : rows.at + rows.stop - rows.start]
            if not target.numel():
                continue
            if entry.dtype == out.dtype:
                self._read_rows(entry, rows, target)
            else:
                self._read_converted(entry, rows, target)

    def rows(self, tensor_slice: TensorSlice) -> StoredRows:
        """The slice's rows, left where they are and read when asked for.

        Raises:
            ValueError: they don't lie side by side.
        """
        tensor_slice = self._placed(tensor_slice)
        entry = self.find(tensor_slice)
        place = tensor_slice.pieces(0, tensor_slice.rows)
        if place.count != 1 or len(tensor_slice.local_shape) != 2:
            raise ValueError(f"{tensor_slice} is no range of a matrix's rows")
        descriptor = os.dup(self._open(entry.file))
        offset = entry.offset + place.first * entry.dtype.itemsize
        return StoredRows(entry, descriptor, offset, *tensor_slice.local_shape)

    def _read_converted(self, entry: Entry, rows: Rows, out: Tensor) -> None:
        row_bytes = math.prod(rows.tensor_slice.local_shape[1:]) * entry.dtype.itemsize
        at_once = max(1, STAGING_BYTES // row_bytes)
        for first in range(rows.start, rows.stop, at_once):
            last = min(first + at_once, rows.stop)
            staging = self._stage((last - first) * row_bytes).view(entry.dtype).view(last - first, *out.shape[1:])
            self._read_rows(entry, Rows(rows.tensor_slice, first, last, 0), staging)
            out[first - rows.start : last - rows.start].copy_(staging)

    def _stage(self, size: int) -> Tensor:
        if self._staging is None or self._staging.numel() < size:
            self._staging = torch.empty(max(size, STAGING_BYTES), dtype=torch.uint8)
        return self._staging[:size]

    def _read_rows(self, entry: Entry, rows: Rows, out: Tensor) -> None:
        """Rows [start, stop) of the slice, in the tensor's own dtype."""
        buffer = out.view(torch.uint8).reshape(-1).numpy().data
        descriptor, size = self._open(entry.file), entry.dtype.itemsize
        place = rows.tensor_slice.pieces(rows.start, rows.stop)
        offset, part, stride = entry.offset + place.first * size, place.length * size, place.stride * size
        for piece in range(place.count):
            _fill(entry, descriptor, buffer[piece * part : (piece + 1) * part], offset + piece * stride)
        self.bytes_read += len(buffer)
        self._progress(len(buffer))

    def _open(self, file: Path) -> int:
        if file not in self._descriptors:
            try:
                self._descriptors[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:  # it was readable a moment ago
                raise ModelError(unreadable(file, error)) from error
        return self._descriptors[file]


def with_dtype(directory: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration, with the weights' own type where it names none.

    Raises:
        ModelError: as `Checkpoint`.
    """
    if dtype_name(config) is not None:
        return config
    checkpoint = Checkpoint(directory)
    native = checkpoint.native_dtype()
    checkpoint.close()
    return {**config, "dtype": str(native or torch.float32).removeprefix("torch.")}


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


def _files(directory: Path, index: Mapping[str, str]) -> list[Path]:
    """As transformers looks for them: one file before the index of several."""
    if (directory / SINGLE).exists():
        return [directory / SINGLE]
    if index:
        return [_present(directory, name) for name in sorted(set(index.values()))]
    files = [file for file in sorted(directory.glob("*.safetensors")) if not file.name.startswith("adapter_")]
    if not files:
        raise ModelError(f"{directory} holds no safetensors file{_others(directory)}")
    return files


def _present(directory: Path, name: str) -> Path:
    if not os.path.lexists(directory / name):
        raise ModelError(
            f"{directory / name} is missing, though {INDEX} names it: the download or copy is incomplete, or the index "
            "is another checkpoint's; fetch both again"
        )
    return directory / name


def _others(directory: Path) -> str:
    """What is there instead."""
    for pattern, words in (
        ("adapter_model.safetensors", "it is an adapter (LoRA): merge it into its model first"),
        ("*.gguf", "llama.cpp's format is not read; give the model's original checkpoint"),
        ("pytorch_model*.bin", "pickled weights are not read; convert them to safetensors"),
        ("*.pth", "pickled weights are not read; convert them to safetensors"),
    ):
        if found := next(iter(sorted(directory.glob(pattern))), None):
            return f", but {found.name}: {words}"
    return ""


def _index(directory: Path) -> Mapping[str, str]:
    """Which file holds which tensor; empty where there is no index, or one file that goes before it."""
    path = directory / INDEX
    if (directory / SINGLE).exists():
        return {}
    index = read_object(path)
    if index is None:
        return {}
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{path} is no index of safetensors files: it has no weight_map")
    names = {str(tensor): str(name) for tensor, name in weight_map.items()}
    for name in names.values():
        if Path(name).name != name:
            raise ModelError(f"{path} names the file {name}, which is not in the model's own directory")
    return names
