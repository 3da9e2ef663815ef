"""An image's pixels, where it stands in a sequence, and what its tokens' positions are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

HELD_TOKENS: Final = 8192  # of images, that the ranks hold beside a step, unless one image has more


class Pixels(msgspec.Struct, frozen=True, kw_only=True):
    """RGB, 8 bits, row by row."""

    height: int
    width: int
    data: bytes
    digest: str  # as `digest_of` gives it


def digest_of(height: int, width: int, data: bytes | memoryview) -> str:
    """What tells whether two images are equal."""
    hashed = hashlib.sha256(b"%d x %d " % (height, width))
    hashed.update(data)
    return hashed.hexdigest()


class ImageSpan(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens of one image: `rows` by `columns`, from the sequence's token `start` on."""

    digest: str  # of its pixels
    start: int
    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        return self.rows * self.columns

    @property
    def stop(self) -> int:
        return self.start + self.tokens

    @property
    def shift(self) -> int:
        """What the positions of the tokens after it differ by: an image advances them by its longer side only."""
        return max(self.rows, self.columns) - self.tokens


def shift_before(spans: Iterable[ImageSpan], position: int) -> int:
    """Of the images that end at or before this token."""
    return sum(span.shift for span in spans if span.stop <= position)


def rotary_positions(start: int, stop: int, spans: Iterable[ImageSpan], shift: int) -> Iterator[tuple[int, int, int]]:
    """Time, height and width of tokens [start, stop) of a sequence; `spans`: the images that reach into them, in order;
    `shift`: of the images before those.

    Source: `get_rope_index` of transformers' modeling_qwen3_5.
    """
    for span in spans:
        for position in range(start, span.start):
            yield (position + shift,) * 3
        first = span.start + shift
        for row, column in (
            divmod(token - span.start, span.columns) for token in range(max(start, span.start), min(stop, span.stop))
        ):
            yield first, first + row, first + column
        start, shift = max(start, span.stop), shift + span.shift
    for position in range(start, stop):
        yield (position + shift,) * 3
