"""Draws of a batch of which some rows have rules, and some must be put off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from lockstep_runtime.protocol.step import SampledToken, SequenceSlice
from lockstep_runtime.worker.likeliest import check_finite
from lockstep_runtime.worker.rulebook import Rulebook
from lockstep_runtime.worker.sampler import draw_of, sample


@dataclass(frozen=True, slots=True)
class Drawn:
    sampled: list[SampledToken] = field(default_factory=list)
    put_off: list[int] = field(default_factory=list)  # ids of sequences that are to come again


def draw_by_rules(logits: Tensor, sequences: Sequence[SequenceSlice], rulebook: Rulebook) -> Drawn:
    """logits: [n, vocabulary], of the last token of each slice, which may be changed.

    Raises:
        NonFiniteError: of a row that is put off, too.
    """
    ruled, unknown = rulebook.rows(sequences)
    draws = [draw_of(sequence) for sequence in sequences]
    if not unknown:
        return Drawn(sample(logits, draws, ruled))
    check_finite(logits[unknown])
    put_off = [sequences[row].sequence_id for row in unknown]
    known = [row for row in range(len(draws)) if row not in unknown]
    if not known:
        return Drawn(put_off=put_off)
    moved = [replace(one, row=known.index(one.row)) for one in ruled]
    return Drawn(sample(logits[known], [draws[row] for row in known], moved), put_off)
