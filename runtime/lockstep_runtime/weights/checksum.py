"""Checksums of tensors, fast enough for a continuous scrub.

A tensor's bytes are summed page by page as 64-bit words, and the sums are hashed. A changed bit changes the sum of its
page; the hash keeps the pages in order. It guards against accidents, not against intent.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Generator
from typing import Final

import numpy as np
import torch
from torch import Tensor

PAGE_WORDS: Final = 512
PAGE_BYTES: Final = PAGE_WORDS * 8
PART_BYTES: Final = 16 * 1024 * 1024  # a few milliseconds on a CPU: what a scrub may delay a step by


def checksum(tensor: Tensor) -> str:
    """16 hex digits of a contiguous tensor's bytes, the same on every device."""
    parts = checksum_in_parts(tensor)
    while True:
        try:
            next(parts)
        except StopIteration as end:
            return str(end.value)


def checksum_in_parts(tensor: Tensor) -> Generator[None, None, str]:
    """The same, with a pause after every `PART_BYTES`."""
    raw = tensor.detach().reshape(-1).view(torch.uint8)
    hashed = hashlib.blake2b(digest_size=8)
    whole = raw.shape[0] // PAGE_BYTES * PAGE_BYTES
    for start in range(0, whole, PART_BYTES):
        words = raw[start : min(start + PART_BYTES, whole)].view(torch.int64)
        hashed.update(words.view(-1, PAGE_WORDS).sum(1).cpu().numpy().data)
        yield
    hashed.update(raw[whole:].cpu().numpy().data)
    return hashed.hexdigest()


class RunningChecksum:
    """The checksum of a tensor whose bytes come in pieces: in any order, from any thread, each byte once."""

    def __init__(self, nbytes: int) -> None:
        self._sums = np.zeros(nbytes // PAGE_BYTES, dtype=np.int64)
        self._left = nbytes
        self._parts: dict[int, bytearray] = {}  # pages of which a part has come, by number; and the bytes of the last
        self._tail = bytearray(nbytes % PAGE_BYTES)
        self._lock = threading.Lock()

    def add(self, start: int, piece: memoryview) -> None:
        """The tensor's bytes from `start` on."""
        stop = start + len(piece)
        first, last = -(-start // PAGE_BYTES), min(stop // PAGE_BYTES, len(self._sums))  # of whole pages
        edges = [(start, piece)]
        if first < last:
            begin, end = first * PAGE_BYTES - start, last * PAGE_BYTES - start
            words = np.frombuffer(piece[begin:end], np.int64)
            self._sums[first:last] = words.reshape(-1, PAGE_WORDS).sum(axis=1)
            edges = [(start, piece[:begin]), (start + end, piece[end:])]
        with self._lock:
            self._left -= len(piece)
            for at, edge in edges:
                self._add_edge(at, edge)

    def hexdigest(self) -> str:
        """16 hex digits, as `checksum` gives.

        Raises:
            ValueError: bytes are missing.
        """
        if self._left:
            raise ValueError(f"{self._left} bytes are missing")
        for page, part in self._parts.items():
            self._sums[page] = np.frombuffer(part, np.int64).sum()
        hashed = hashlib.blake2b(self._sums.data, digest_size=8)
        hashed.update(self._tail)
        return hashed.hexdigest()

    def _add_edge(self, start: int, piece: memoryview) -> None:
        """Of one page, or of two neighbours."""
        while piece:
            page, at = divmod(start, PAGE_BYTES)
            part = self._tail if page == len(self._sums) else self._parts.setdefault(page, bytearray(PAGE_BYTES))
            taken = min(len(piece), len(part) - at)
            part[at : at + taken] = piece[:taken]
            start, piece = start + taken, piece[taken:]
