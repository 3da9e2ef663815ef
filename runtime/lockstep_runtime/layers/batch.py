"""A step as tensors: all sequences' new tokens side by side, and where what the layers remember of each one lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from lockstep_runtime.layers.attention import AttendLayer, Attention, SequenceAttention
from lockstep_runtime.layers.cache import BLOCK_SIZE
from lockstep_runtime.protocol.images import rotary_positions
from lockstep_runtime.protocol.step import SequenceSlice

BY_SEQUENCE: Final = SequenceAttention()


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One sequence's part: tokens [start, stop) of the batch, which see `context` tokens (themselves included)."""

    start: int
    stop: int
    context: int


@dataclass(frozen=True, slots=True)
class ImageRows:
    """Tokens [start, stop) of the batch are an image's: `states` [stop - start, hidden] are their embeddings."""

    start: int
    stop: int
    states: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    given: Tensor  # [3 (4, 6), tokens], on the host: tokens, positions, slots, and turns where they differ
    tokens: Tensor  # [tokens]
    positions: Tensor  # [tokens], in their sequences
    turns: Tensor  # [tokens] positions for rotary embeddings, or [3, tokens] where there are images
    slots: Tensor  # [tokens], where their keys and values go
    segments: tuple[Segment, ...]
    ends: Tensor  # [3, segments], on the host: the same of the three below
    last: Tensor  # [segments], index of each one's last token
    state_reads: Tensor  # [segments], the slot of each one's recurrent state before this step
    state_writes: Tensor  # [segments], and after it
    attend: AttendLayer
    images: tuple[ImageRows, ...] = ()

    def place_images(self, hidden: Tensor) -> Tensor:
        """hidden: [tokens, hidden], embeddings -> the same, with images' tokens in their places."""
        for rows in self.images:
            hidden[rows.start : rows.stop] = rows.states
        return hidden


def build_batch(sequences: Sequence[SequenceSlice], device: torch.device, attention: Attention = BY_SEQUENCE) -> Batch:
    """
    Raises:
        ValueError: a slice without tokens, or whose blocks don't cover it.
    """
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    segments: list[Segment] = []
    for sequence in sequences:
        stop = sequence.position + len(sequence.tokens)
        if not sequence.tokens or len(sequence.blocks) * BLOCK_SIZE < stop:
            raise ValueError(f"sequence {sequence.sequence_id}: {len(sequence.blocks)} blocks for {stop} tokens")
        segments.append(Segment(start=len(tokens), stop=len(tokens) + len(sequence.tokens), context=stop))
        tokens += sequence.tokens
        positions += range(sequence.position, stop)
        slots += [
            sequence.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            for position in range(sequence.position, stop)
        ]
    given = torch.tensor([tokens, positions, slots, *_turns(sequences)])
    inputs = given.to(device)
    ends = torch.tensor(
        [
            [segment.stop - 1 for segment in segments],
            [sequence.state.read for sequence in sequences],
            [sequence.state.write for sequence in sequences],
        ]
    )
    last, state_reads, state_writes = ends.to(device)
    return Batch(
        given=given,
        tokens=inputs[0],
        positions=inputs[1],
        turns=inputs[1] if len(inputs) == 3 else inputs[3] if len(inputs) == 4 else inputs[3:],
        slots=inputs[2],
        segments=tuple(segments),
        ends=ends,
        last=last,
        state_reads=state_reads,
        state_writes=state_writes,
        attend=attention.plan(sequences, device),
    )


def _turns(sequences: Sequence[SequenceSlice]) -> list[list[int]]:
    """The rows of rotary positions: none where they are those of the sequences, one where they are shifted only, three
    where an image's tokens are among them."""
    if any(sequence.images for sequence in sequences):
        kinds = [
            kind
            for sequence in sequences
            for kind in rotary_positions(
                sequence.position, sequence.position + len(sequence.tokens), sequence.images, sequence.shift
            )
        ]
        return [list(axis) for axis in zip(*kinds, strict=True)]
    if any(sequence.shift for sequence in sequences):
        return [
            [
                position + sequence.shift
                for sequence in sequences
                for position in range(sequence.position, sequence.position + len(sequence.tokens))
            ]
        ]
    return []
