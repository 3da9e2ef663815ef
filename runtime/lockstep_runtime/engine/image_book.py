"""Which images the ranks have made tokens of, and which they are to encode in the next step. Pure.

The vision tower is split over the ranks, so all of them encode an image in the same step: the first that needs it. What
they have encoded stays there while a sequence is within the image, and after that, for another sequence with an equal
one, until its room is needed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final

from lockstep_runtime.engine.sequence import Sequence
from lockstep_runtime.protocol.bus import ImageWork
from lockstep_runtime.protocol.images import HELD_TOKENS, ImageSpan, Pixels

STEP_TOKENS: Final = 576  # of images that one step encodes, or one image: others' next tokens wait for it


class ImageBook:
    """`begin` a plan, `feed` its sequences, send `work`, and tell whether it was `booked`."""

    def __init__(self) -> None:
        self._encoded: dict[str, int] = {}  # tokens by digest, what was used last at the end
        self._encoding: dict[str, tuple[int, Pixels]] = {}  # in the step that is planned
        self._dropping: dict[str, None] = {}
        self._sent: set[str] = set()  # whatever of it the ranks may hold
        self._within: set[str] = set()  # images that running sequences are in the middle of
        self._used: set[str] = set()  # that the planned step feeds
        self._fed = False  # whether it feeds anything yet

    def begin(self, sequences: Collection[Sequence]) -> None:
        """`sequences`: those that run."""
        self._encoding, self._used, self._fed = {}, set(), False
        with_images = [one for one in sequences if one.request.images]
        self._within = {
            image.span.digest
            for one in with_images
            for image in one.request.images
            if image.span.start < one.computed < image.span.stop
        }
        if len(self._sent) > len(self._encoded):  # of a step that failed
            self._drop(self._sent - self._encoded.keys() - wanted(with_images))

    def feed(self, sequence: Sequence, count: int) -> int:
        """How many of the sequence's next `count` tokens the step can take: up to an image that has to wait. No image
        waits before something is fed, so that every step gets further."""
        end = sequence.computed + count
        for image in sequence.request.images:
            span = image.span
            if sequence.computed < span.stop and span.start < end and not self._take(span, image.pixels):
                count = max(0, span.start - sequence.computed)
                break
        self._fed = self._fed or count > 0
        return count

    def work(self) -> tuple[ImageWork, list[Pixels]]:
        """For the step that was planned, and the pixels that the ranks need for it."""
        self._sent |= self._encoding.keys()
        work = ImageWork(drop=list(self._dropping), encode=list(self._encoding))
        return work, [pixels for _, pixels in self._encoding.values()]

    def booked(self) -> None:
        """The step is done."""
        for digest, (tokens, _) in self._encoding.items():
            self._encoded[digest] = tokens
        self._sent -= self._dropping.keys() - self._encoding.keys()
        self._encoding, self._dropping = {}, {}

    def forget(self, sequences: Iterable[Sequence]) -> None:
        """The ranks' tokens are gone: an epoch begins. Their pixels are still there, and are dropped but for those that
        these sequences need."""
        self._encoded, self._encoding = {}, {}
        self._dropping = {}
        self._drop(self._sent - wanted(sequences))

    def _take(self, span: ImageSpan, pixels: Pixels) -> bool:
        digest = span.digest
        if digest in self._encoded:
            self._encoded[digest] = self._encoded.pop(digest)
        elif digest not in self._encoding:
            if not self._makes_room(span.tokens):
                return False
            self._encoding[digest] = (span.tokens, pixels)
        self._used.add(digest)
        return True

    def _makes_room(self, tokens: int) -> bool:
        encoding = sum(count for count, _ in self._encoding.values())
        if encoding and encoding + tokens > STEP_TOKENS:
            return False
        for digest in list(self._encoded):
            if self._held + encoding + tokens <= HELD_TOKENS:
                return True
            if digest not in self._used and not (self._fed and digest in self._within):
                self._drop([digest])
        held = self._held + encoding
        return not held or held + tokens <= HELD_TOKENS

    @property
    def _held(self) -> int:
        return sum(self._encoded.values())

    def _drop(self, digests: Iterable[str]) -> None:
        for digest in sorted(digests):
            self._encoded.pop(digest, None)
            self._dropping[digest] = None


def wanted(sequences: Iterable[Sequence]) -> set[str]:
    """The images that these have not computed past."""
    return {image.span.digest for one in sequences for image in one.request.images if one.computed < image.span.stop}
