"""Checksums of tensors, fast enough for a continuous scrub.

A tensor's bytes are summed page by page as 64-bit words, and the sums are hashed. A changed bit changes the sum of its
page; the hash keeps the pages in order. It guards against accidents, not against intent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from typing import Final

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
