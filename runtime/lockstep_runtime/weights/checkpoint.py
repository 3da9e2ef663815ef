"""Safetensors, read by the slice: a rank's bytes go straight to where they belong.

A slice by rows is one contiguous range of its file; a slice by columns is one piece per row (`slice_reader` says how
those are read). Nothing is ever unpickled.

The format's own library maps the files: of two ranks of a 0.6B model each took as long as here to fill its 596 MB, with
1.4 GB resident at the most instead of 0.58. Here a rank's bytes go where they belong, the mapped weight cache or a
pinned window; they are counted as they come, so that a load that stands still is told from a slow one; and a file that
is cut short while it is read is a sentence, where the library's process dies of SIGBUS.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.sources.files import read_object
from lockstep_runtime.sources.model_config import dtype_name
from lockstep_runtime.weights.safetensors_file import DTYPES, Entry, Unread, read_header
from lockstep_runtime.weights.sharding import TensorSlice, rows_of
from lockstep_runtime.weights.slice_reader import FileTarget, MemoryTarget, SliceReader, Source, fill

INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
# What a weight's tensors are called where a quantised form takes its place.
_QUANTISED_NAMES: Final = ("qweight", "weight_packed", "weight_quantized", "weight_scale", "SCB", "absmax")


class Checkpoint:
    """All tensors of a model directory. `progress` is called for each read, by whichever thread, one at a time."""

    def __init__(self, directory: Path, progress: Callable[[int], None] = lambda _: None) -> None:
        """`progress`: of the bytes of slices that are read so far."""
        self.directory = directory
        self._index = _index(directory)
        files = _files(directory, self._index)
        self._entries = {name: entry for file in files for name, entry in read_header(file).items()}
        self._reader = SliceReader(progress)

    @property
    def bytes_read(self) -> int:
        """From the files."""
        return self._reader.bytes_read

    def close(self) -> None:
        self._reader.close()

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
        return tensor_slice.numel * self.find(tensor_slice).dtype.itemsize

    def read(self, slices: tuple[TensorSlice, ...], start: int, stop: int, out: Tensor) -> None:
        """Fill `out` (contiguous, on the CPU, any float type) with rows [start, stop) of the stacked slices.

        Any number of threads may call this at once.

        Raises:
            ModelError: as `find`; or the file can't be read, or ends within a tensor.
            ValueError: `out` is not contiguous.
        """
        self._reader.read(self._sources(slices, start, stop), MemoryTarget(out))

    def copy(self, slices: tuple[TensorSlice, ...], target: FileTarget) -> None:
        """The same of all rows, to a file.

        Raises:
            ModelError: as `read`.
            OSError: the target can't be written.
        """
        self._reader.read(self._sources(slices, 0, sum(one.rows for one in slices)), target)

    def _sources(self, slices: tuple[TensorSlice, ...], start: int, stop: int) -> Iterator[Source]:
        for rows in rows_of(tuple(map(self._placed, slices)), start, stop):
            one = rows.tensor_slice
            row = math.prod(one.local_shape[1:])
            yield Source(self.find(one), one.pieces(rows.start, rows.stop), rows.at * row)

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
        descriptor = os.dup(self._reader.descriptor(entry.file))
        offset = entry.offset + place.first * entry.dtype.itemsize
        return StoredRows(entry, descriptor, offset, *tensor_slice.local_shape)


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
            fill(self._entry, self._descriptor, buffer[place * size : (place + 1) * size], self._offset + index * size)
        return out


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
