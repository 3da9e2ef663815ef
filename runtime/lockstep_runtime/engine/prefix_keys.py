"""Keys of full blocks by their contents: two have the same only if their keys and values are of the same tokens. Pure.

A block's key is a hash of the key before it, of its own tokens and of the images that reach into it; the first one's is
of the salt, which parts those who may not learn from how fast an answer comes what others have asked. With 128 bits of
BLAKE2b nobody can make two prompts whose blocks are taken for each other.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

import msgspec

from lockstep_runtime.protocol.images import ImageSpan

KEY_BYTES: Final = 16


class PrefixKeys:
    """Of one sequence, whose tokens may become more."""

    def __init__(self, salt: str, block_size: int, images: Sequence[ImageSpan] = ()) -> None:
        self.block_size = block_size
        self._images = images
        self._last = blake2b(salt.encode(), digest_size=KEY_BYTES, person=b"salt").digest()
        self._keys: list[bytes] = []

    def of(self, tokens: Sequence[int], blocks: int) -> list[bytes]:
        """Of the sequence's first blocks, which are full of its tokens; hashed once each."""
        size = self.block_size
        pack = struct.Struct(f"<{size}q").pack
        for start in range(len(self._keys) * size, blocks * size, size):
            shown = [one for one in self._images if one.start < start + size and start < one.stop]
            contents = pack(*tokens[start : start + size]) + (msgspec.msgpack.encode(shown) if shown else b"")
            self._last = blake2b(self._last + contents, digest_size=KEY_BYTES).digest()
            self._keys.append(self._last)
        return self._keys[:blocks]
