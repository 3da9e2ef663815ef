"""Draws of a batch of which some rows have rules, and some can't be made."""

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
    failures: dict[int, str] = field(default_factory=dict)  # of sequences that can't go on


def draw_by_rules(logits: Tensor, sequences: Sequence[SequenceSlice], rulebook: Rulebook) -> Drawn:
    """logits: [n, vocabulary], of the last token of each slice, which may be changed.

    Raises:
        NonFiniteError: of a row that is left out, too.
    """
    page = rulebook.page(sequences)
    draws = [draw_of(sequence) for sequence in sequences]
    if not page.left_out:
        return Drawn(sample(logits, draws, page.ruled))
    check_finite(logits)
    rows = [row for row in range(len(draws)) if row not in page.left_out]
    moved = [replace(one, row=rows.index(one.row)) for one in page.ruled]
    return Drawn(
        sample(logits[rows], [draws[row] for row in rows], moved) if rows else [],
        [sequences[row].sequence_id for row in page.put_off],
        {sequences[row].sequence_id: why for row, why in page.failures.items()},
    )
