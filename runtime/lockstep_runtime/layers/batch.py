"""A step as tensors: all sequences' new tokens side by side, and where each one's keys and values lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lockstep_runtime.layers.cache import BLOCK_SIZE
from lockstep_runtime.protocol.step import SequenceSlice


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One sequence's part: tokens [start, stop) of the batch, which see `context` tokens (themselves included)."""

    start: int
    stop: int
    context: int
    first_slot: int  # of the sequence, when its blocks lie side by side; else -1
    slots: Tensor | None  # [context], when they don't


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    given: Tensor  # [3, tokens], on the host: the three below, side by side
    tokens: Tensor  # [tokens]
    positions: Tensor  # [tokens], in their sequences
    slots: Tensor  # [tokens], where their keys and values go
    segments: tuple[Segment, ...]
    last: Tensor  # [segments], index of each one's last token


def build_batch(sequences: Sequence[SequenceSlice], device: torch.device) -> Batch:
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
        segments.append(_segment(sequence, len(tokens), stop, device))
        tokens += sequence.tokens
        positions += range(sequence.position, stop)
        slots += [
            sequence.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            for position in range(sequence.position, stop)
        ]
    given = torch.tensor([tokens, positions, slots])
    inputs = given.to(device)
    return Batch(
        given=given,
        tokens=inputs[0],
        positions=inputs[1],
        slots=inputs[2],
        segments=tuple(segments),
        last=torch.tensor([segment.stop - 1 for segment in segments], device=device),
    )


def _segment(sequence: SequenceSlice, start: int, context: int, device: torch.device) -> Segment:
    blocks = sequence.blocks[: -(-context // BLOCK_SIZE)]
    side_by_side = blocks == list(range(blocks[0], blocks[0] + len(blocks)))
    slots = None
    if not side_by_side:
        firsts = torch.tensor(blocks, device=device)[:, None] * BLOCK_SIZE
        slots = (firsts + torch.arange(BLOCK_SIZE, device=device)).view(-1)[:context]
    return Segment(
        start=start,
        stop=start + len(sequence.tokens),
        context=context,
        first_slot=blocks[0] * BLOCK_SIZE if side_by_side else -1,
        slots=slots,
    )
