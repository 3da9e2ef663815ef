"""A step as tensors: all sequences' new tokens side by side, and where what the layers remember of each one lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from lockstep_runtime.layers.attention import AttendLayer, Attention, SequenceAttention
from lockstep_runtime.layers.cache import BLOCK_SIZE
from lockstep_runtime.protocol.step import SequenceSlice

BY_SEQUENCE: Final = SequenceAttention()


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One sequence's part: tokens [start, stop) of the batch, which see `context` tokens (themselves included)."""

    start: int
    stop: int
    context: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    given: Tensor  # [3, tokens], on the host: the three below, side by side
    tokens: Tensor  # [tokens]
    positions: Tensor  # [tokens], in their sequences
    slots: Tensor  # [tokens], where their keys and values go
    segments: tuple[Segment, ...]
    ends: Tensor  # [3, segments], on the host: the same of the three below
    last: Tensor  # [segments], index of each one's last token
    state_reads: Tensor  # [segments], the slot of each one's recurrent state before this step
    state_writes: Tensor  # [segments], and after it
    attend: AttendLayer


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
    given = torch.tensor([tokens, positions, slots])
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
        slots=inputs[2],
        segments=tuple(segments),
        ends=ends,
        last=last,
        state_reads=state_reads,
        state_writes=state_writes,
        attend=attention.plan(sequences, device),
    )
