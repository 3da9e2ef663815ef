"""Bytes of slices from files to where they belong, in parallel and converted on the way.

What is read is cut into chunks that threads take one after the other. A chunk is read straight into its place; if it is
converted, lies in pieces or goes to another file, through a buffer of the thread's own that stays in a CPU's cache.

Between the pieces of a slice by columns lie other ranks' columns. A gap of up to `MOST_GAP_BYTES` is read, too, and
dropped: a call for every piece would cost more, and a disk reads ahead over it anyway.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import torch
from torch import Tensor

from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.sources.files import unreadable
from lockstep_runtime.weights.checksum import RunningChecksum
from lockstep_runtime.weights.parallel_map import threads
from lockstep_runtime.weights.safetensors_file import Entry
from lockstep_runtime.weights.sharding import Pieces

CHUNK_BYTES = 1024 * 1024  # of a file
MOST_GAP_BYTES = 16 * 1024
SERIAL_ELEMENTS: Final = 32_767  # torch copies so many without threads of its own, which would outnumber the cores


@dataclass(frozen=True, slots=True)
class Source:
    """Pieces of a tensor, and at which element of the target they go, one behind the other."""

    entry: Entry
    pieces: Pieces
    at: int


class Target(Protocol):
    """Where slices go, in which type."""

    @property
    def dtype(self) -> torch.dtype: ...

    def place(self, at: int, count: int) -> Tensor | None:
        """The memory of elements [at, at + count), [count]; None: they are handed to `write` instead."""

    def write(self, at: int, numbers: Tensor) -> None:
        """Take those elements, [count]."""


class MemoryTarget:
    """A tensor of any shape, contiguous, on the CPU."""

    def __init__(self, out: Tensor) -> None:
        """
        Raises:
            ValueError: it is not contiguous.
        """
        if not out.is_contiguous():
            raise ValueError("only contiguous memory can be read into")
        self._out, self.dtype = out.view(-1), out.dtype

    def place(self, at: int, count: int) -> Tensor:
        return self._out[at : at + count]

    def write(self, at: int, numbers: Tensor) -> None:
        """They are there."""


@dataclass(frozen=True, slots=True)
class FileTarget:
    """An open file's bytes from `offset` on, summed as they come. To write to a new file on tmpfs takes two thirds of
    the time that it takes to map it and touch its pages."""

    descriptor: int
    offset: int
    dtype: torch.dtype
    checksum: RunningChecksum

    def place(self, at: int, count: int) -> None:
        """Nowhere in memory."""

    def write(self, at: int, numbers: Tensor) -> None:
        """
        Raises:
            OSError: there is no room, or whatever else a file can have.
        """
        buffer, start = _bytes(numbers), at * self.dtype.itemsize
        self.checksum.add(start, buffer)
        offset = self.offset + start
        while buffer:
            written = os.pwrite(self.descriptor, buffer, offset)
            buffer, offset = buffer[written:], offset + written


class SliceReader:
    """Threads that read, and the files they have open. Any thread may call `read`."""

    def __init__(self, progress: Callable[[int], None]) -> None:
        """`progress`: of the bytes of slices that are read so far; no two calls at once."""
        self.bytes_read = 0  # from the files
        self._progress = progress
        self._done = 0
        self._lock = threading.Lock()
        self._descriptors: dict[Path, int] = {}
        self._threads = ThreadPoolExecutor(threads())
        self._own = threading.local()  # each thread's buffers, by what they are for

    def close(self) -> None:
        """Once nothing is read any more."""
        self._threads.shutdown()
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def descriptor(self, file: Path) -> int:
        """Of the file, open until `close`.

        Raises:
            ModelError: it can't be opened.
        """
        with self._lock:
            if file not in self._descriptors:
                try:
                    self._descriptors[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:  # it was readable a moment ago
                    raise ModelError(unreadable(file, error)) from error
            return self._descriptors[file]

    def read(self, sources: Iterable[Source], target: Target) -> None:
        """All of the sources' pieces into their places; returns when they are there.

        Raises:
            ModelError: a file can't be read, or ends within a tensor.
            OSError: the target can't be written.
        """
        chunks = [chunk for source in sources for chunk in _chunks(source)]
        if len(chunks) <= 1:
            for chunk in chunks:
                self._transfer(chunk, target)
            return
        transfers = [self._threads.submit(self._transfer, chunk, target) for chunk in chunks]
        try:
            for transfer in transfers:
                transfer.result()
        finally:  # nothing writes to the target any more when this returns, or raises
            wait([transfer for transfer in transfers if not transfer.cancel()])

    def _transfer(self, chunk: Source, target: Target) -> None:
        with torch.inference_mode():
            size = chunk.pieces.count * chunk.pieces.length
            place = target.place(chunk.at, size)
            numbers = self._buffer("converted", size, target.dtype) if place is None else place
            count = self._fill(chunk.entry, chunk.pieces, numbers)
            target.write(chunk.at, numbers)
        with self._lock:
            self.bytes_read += count
            self._done += size * chunk.entry.dtype.itemsize
            self._progress(self._done)

    def _fill(self, entry: Entry, pieces: Pieces, numbers: Tensor) -> int:
        """Read the pieces into `numbers`, [count * length], of any type; returns the bytes read."""
        size, descriptor = entry.dtype.itemsize, self.descriptor(entry.file)
        gap = (pieces.stride - pieces.length) * size if pieces.count > 1 else 0
        if entry.dtype == numbers.dtype and gap == 0:
            fill(entry, descriptor, _bytes(numbers), entry.offset + pieces.first * size)
            return numbers.nbytes
        return self._fill_staged(entry, pieces, numbers, whole=gap <= MOST_GAP_BYTES)

    def _fill_staged(self, entry: Entry, pieces: Pieces, numbers: Tensor, *, whole: bool) -> int:
        """The same by way of a buffer, with what lies between the pieces if it is read `whole`."""
        size, descriptor = entry.dtype.itemsize, self.descriptor(entry.file)
        staging = self._buffer("read", pieces.span if whole else numbers.numel(), entry.dtype)
        raw, offset = _bytes(staging), entry.offset + pieces.first * size
        if whole:
            fill(entry, descriptor, raw, offset)
        else:
            part = pieces.length * size
            for piece in range(pieces.count):
                fill(entry, descriptor, raw[piece * part : (piece + 1) * part], offset + piece * pieces.stride * size)
        shape, stride = (pieces.count, pieces.length), pieces.stride if whole else pieces.length
        _copy(staging.as_strided(shape, (stride, 1)), numbers.view(shape))
        return staging.nbytes

    def _buffer(self, purpose: str, count: int, dtype: torch.dtype) -> Tensor:
        """[count], of the calling thread, until it asks for the next."""
        size = count * dtype.itemsize
        raw: Tensor | None = getattr(self._own, purpose, None)
        if raw is None or raw.numel() < size:
            raw = torch.empty(size, dtype=torch.uint8)
            setattr(self._own, purpose, raw)
        return raw[:size].view(dtype)


def fill(entry: Entry, descriptor: int, buffer: memoryview, offset: int) -> None:
    """The file's bytes from `offset` on.

    Raises:
        ModelError: they can't be read, or there are not so many.
    """
    done = 0
    while done < len(buffer):
        try:
            got = os.preadv(descriptor, [buffer[done:]], offset + done)
        except OSError as error:
            raise ModelError(f"{entry.file} can't be read: {error}") from error
        if got == 0:
            raise ModelError(f"{entry.file} is truncated: it ends at byte {offset + done}, within a tensor")
        done += got


def _chunks(source: Source) -> Iterable[Source]:
    most = max(1, CHUNK_BYTES // source.entry.dtype.itemsize)
    return (Source(source.entry, pieces, source.at + at) for at, pieces in source.pieces.split(most))


def _copy(source: Tensor, target: Tensor) -> None:
    """[pieces, length] both, in this thread alone. numpy has no bfloat16, but starts no threads."""
    if source.dtype == target.dtype:
        target.view(torch.int16).numpy()[:] = source.view(torch.int16).numpy()
        return
    pieces, length = source.shape
    rows, columns = max(1, SERIAL_ELEMENTS // length), SERIAL_ELEMENTS
    for row in range(0, pieces, rows):
        for column in range(0, length, columns):
            block = slice(row, row + rows), slice(column, column + columns)
            target[block].copy_(source[block])


def _bytes(numbers: Tensor) -> memoryview:
    return numbers.view(torch.uint8).numpy().data
