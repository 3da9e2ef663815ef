"""A fake rank's images: what it was sent, what it has encoded, and what a toy cache remembers of an image's tokens."""

from __future__ import annotations

import random
import zlib
from collections import Counter
from dataclasses import dataclass, field

from lockstep_runtime.engine.client import PromptImage
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.images import ImageSpan, Pixels, digest_of
from lockstep_runtime.protocol.step import SequenceSlice


def toy_token(span: ImageSpan, position: int) -> int:
    """What stands in the place of an image's token."""
    return zlib.crc32(f"{span.digest} {position - span.start}".encode()) % 50_000


def seen(prompt: tuple[int, ...], images: tuple[PromptImage, ...]) -> list[int]:
    """A prompt as the toy model sees it."""
    found = list(prompt)
    for image in images:
        for position in range(image.span.start, image.span.stop):
            found[position] = toy_token(image.span, position)
    return found


def toy_image(number: int, start: int, rows: int, columns: int) -> PromptImage:
    """Of a few hundred bytes; equal numbers are equal images."""
    height, width = rows * 8, columns * 8
    data = random.Random(number).randbytes(height * width * 3)
    pixels = Pixels(height=height, width=width, data=data, digest=digest_of(height, width, data))
    return PromptImage(ImageSpan(digest=pixels.digest, start=start, rows=rows, columns=columns), pixels)


@dataclass
class ToyImages:
    """Of one process. `received`: bytes by digest."""

    pixels: dict[str, bytearray] = field(default_factory=dict)
    encoded: set[str] = field(default_factory=set)
    received: Counter[str] = field(default_factory=Counter)
    encodings: int = 0

    def take(self, part: bus.ImagePart) -> None:
        self.received[part.digest] += len(part.data)
        if part.offset == 0:
            self.pixels[part.digest] = bytearray()
        assert part.offset == len(self.pixels[part.digest])
        assert len(part.data) <= bus.IMAGE_PART_BYTES
        self.pixels[part.digest] += part.data
        if len(self.pixels[part.digest]) == part.height * part.width * 3:
            assert digest_of(part.height, part.width, bytes(self.pixels[part.digest])) == part.digest

    def forget(self) -> None:
        self.pixels, self.encoded = {}, set()

    def work(self, work: bus.ImageWork) -> None:
        for digest in work.drop:
            self.encoded.discard(digest)
            if digest not in work.encode:
                self.pixels.pop(digest, None)
        for digest in work.encode:
            assert digest in self.pixels, "an image is to be encoded whose pixels are not here"
            assert digest not in self.encoded, "an image is encoded twice"
            self.encoded.add(digest)
            self.encodings += 1

    def token(self, part: SequenceSlice, position: int, token: int) -> int:
        for span in part.images:
            if span.start <= position < span.stop:
                assert span.digest in self.encoded, "an image's token is fed that is not encoded"
                return toy_token(span, position)
        return token
