"""One rank's images: pixels as they come from the engine, and the tokens that the vision tower has made of them.

The engine says in every step what to encode and what to drop, the same to all ranks, since the tower's layers are split
over them. Nothing is encoded or forgotten otherwise, but for a new epoch and a new connection.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lockstep_runtime.distributed.communicator import Communicator
from lockstep_runtime.layers.batch import Batch, ImageRows
from lockstep_runtime.layers.vision import VisionTower
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.images import digest_of
from lockstep_runtime.protocol.step import SequenceSlice


@dataclass(slots=True)
class _Arriving:
    height: int
    width: int
    data: bytearray = field(default_factory=bytearray)

    @property
    def missing(self) -> int:
        return self.height * self.width * 3 - len(self.data)


class RankImages:
    """Of a model with this tower; None: it takes text only."""

    def __init__(self, tower: VisionTower | None) -> None:
        self._tower = tower
        self._pixels: dict[str, _Arriving] = {}
        self._tokens: dict[str, Tensor] = {}  # [tokens, hidden]

    def take(self, part: bus.ImagePart) -> None:
        """Parts come in order; what begins anew replaces what was there."""
        if part.offset == 0:
            self._pixels[part.digest] = _Arriving(part.height, part.width)
        arriving = self._pixels.get(part.digest)
        if arriving is not None and part.offset == len(arriving.data) and len(part.data) <= arriving.missing:
            arriving.data += part.data

    def forget(self) -> None:
        """Everything: the engine sends it again."""
        self._pixels.clear()
        self._tokens.clear()

    def forget_tokens(self) -> None:
        """What was encoded: another rank may have lost it, and all encode together."""
        self._tokens.clear()

    def place(self, step: bus.Step, batch: Batch, group: Communicator) -> Batch:
        """Drop and encode what the step says, with all ranks of the group; its batch, with images in their places.

        Raises:
            ValueError: the step can't be done with the images that are here; before any collective.
        """
        self._check(step)
        self._work(step.images, group)
        images = self._rows(step.sequences)
        return replace(batch, images=images) if images else batch

    def _check(self, step: bus.Step) -> None:
        dropped = set(step.images.drop)
        counts = {digest: len(tokens) for digest, tokens in self._tokens.items() if digest not in dropped}
        counts |= {digest: self._count(digest) for digest in step.images.encode}
        for sequence in step.sequences:
            for span in sequence.images:
                if counts.get(span.digest) != span.tokens:
                    has = f"it has {counts[span.digest]} tokens" if span.digest in counts else "it is not encoded"
                    raise ValueError(
                        f"sequence {sequence.sequence_id} wants {span.rows} x {span.columns} tokens of the image "
                        f"{span.digest[:12]}: {has}"
                    )

    def _count(self, digest: str) -> int:
        """Tokens that the tower will make of the image."""
        arriving = self._pixels.get(digest)
        if self._tower is None or arriving is None or arriving.missing:
            raise ValueError(f"the image {digest[:12]} is to be encoded, and its pixels are not here")
        if digest_of(arriving.height, arriving.width, memoryview(arriving.data)) != digest:
            raise ValueError(f"the pixels of the image {digest[:12]} are not those that were sent")
        return self._tower.tokens_of(arriving.height, arriving.width)

    def _work(self, images: bus.ImageWork, group: Communicator) -> None:
        for digest in images.drop:
            self._tokens.pop(digest, None)
            if digest not in images.encode:
                self._pixels.pop(digest, None)
        if self._tower is None:
            return
        for digest in images.encode:
            arriving = self._pixels[digest]
            pixels = torch.frombuffer(arriving.data, dtype=torch.uint8)
            self._tokens[digest] = self._tower.encode(pixels.view(arriving.height, arriving.width, 3), group)

    def _rows(self, sequences: Iterable[SequenceSlice]) -> tuple[ImageRows, ...]:
        """What takes the place of which rows of the batch's embeddings."""
        found: list[ImageRows] = []
        begin = 0
        for sequence in sequences:
            stop = sequence.position + len(sequence.tokens)
            for span in sequence.images:
                first, last = max(span.start, sequence.position), min(span.stop, stop)
                at = begin + first - sequence.position
                states = self._tokens[span.digest][first - span.start : last - span.start]
                found.append(ImageRows(at, at + last - first, states))
            begin += len(sequence.tokens)
        return tuple(found)
