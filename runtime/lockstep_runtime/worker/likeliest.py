"""The likeliest tokens of many rows at once, exactly, without a look at each token twice.

Where a row is cut into blocks, its n largest numbers lie in the n blocks whose largest are largest: outside of these
nothing is larger than any of their n largest. So one pass takes each block's largest number, and what is sorted is some
thousand numbers of a vocabulary of 150,000.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

BLOCK: Final = 128  # tokens
CACHED: Final = 1 << 17  # logits that are worked on at once on a CPU: what is computed of them stays in a core's cache
WORTH_IT: Final = 4  # as many times more tokens must there be than the blocks that are looked through


class NonFiniteError(ArithmeticError):
    """The logits hold a NaN or an infinity: some rank computed garbage."""


@dataclass(frozen=True, slots=True)
class Logits:
    """Of one row per sequence, and what one pass over them has found."""

    rows: Tensor  # [n, vocabulary], float32
    largest: Tensor  # [n, vocabulary // BLOCK], of each whole block

    def likeliest(self, of: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """of: [m], row numbers -> logits and tokens, [m, count] or [m, vocabulary] each, from the largest on."""
        size = self.rows.shape[1]
        if count * BLOCK * WORTH_IT > size:
            values, tokens = self.rows[of].topk(min(count, size))
            return values, tokens
        blocks = self.largest[of].topk(count).indices
        whole = _blocks(self.rows)
        values = whole[of[:, None], blocks].flatten(1)
        if size % BLOCK:  # as a last block, which has fewer
            values = torch.cat((values, self.rows[of, whole.shape[1] * BLOCK :]), dim=1)
            blocks = torch.cat((blocks, blocks.new_full((len(of), 1), whole.shape[1])), dim=1)
        values, places = values.topk(count)
        return values, blocks.gather(1, places // BLOCK) * BLOCK + places % BLOCK

    def look_again(self, of: Tensor) -> None:
        """of: [m], numbers of rows that were changed. What is minus infinity in them is never among the likeliest, but
        for want of others."""
        for some in pieces(self.rows, len(of)) if self.largest.shape[1] else ():
            self.largest[of[some]] = _blocks(self.rows[of[some]]).amax(dim=2)


def look_at(logits: Tensor) -> Logits:
    """logits: [n, vocabulary], float32.

    Raises:
        NonFiniteError: naming how many rows are bad.
    """
    largest = logits.new_empty(logits.shape[0], logits.shape[1] // BLOCK)
    sums = logits.new_empty(logits.shape[0])
    for some in pieces(logits, len(logits)):
        torch.sum(logits[some], dim=1, out=sums[some])
        if largest.shape[1]:
            torch.amax(_blocks(logits[some]), dim=2, out=largest[some])
    if not bool(torch.isfinite(sums.sum())):  # a sum that overflows is looked at again
        check_finite(logits)
    return Logits(logits, largest)


def check_finite(rows: Tensor, what: str = "logits") -> None:
    """rows: [sequences, n].

    Raises:
        NonFiniteError: naming how many rows are bad.
    """
    if not bool(torch.isfinite(rows.sum())):
        bad = int((~torch.isfinite(rows)).any(dim=-1).sum())
        if bad:
            raise NonFiniteError(f"the {what} of {bad} of {rows.shape[0]} sequences hold NaN or infinity")


def pieces(logits: Tensor, rows: int) -> list[slice]:
    """So many rows like these, as many at once as it is well to work on."""
    count = max(1, CACHED // logits.shape[1]) if logits.is_cpu else max(1, rows)
    return [slice(start, start + count) for start in range(0, rows, count)]


def total_weight(logits: Tensor, best: Tensor, temperature: Tensor) -> Tensor:
    """Of all tokens, as a multiple of the likeliest one's: [n, 1], float64. best and temperature: [n, 1].

    A row's sum is taken in the same order whatever the number of rows.
    """
    sums = logits.new_empty(logits.shape[0], 1, dtype=torch.float64)
    scale = temperature.to(logits.dtype)
    some_pieces = pieces(logits, len(logits))
    buffer = torch.empty_like(logits[some_pieces[0]])
    for some in some_pieces:
        weights = torch.sub(logits[some], best[some], out=buffer[: len(logits[some])]).div_(scale[some]).exp_()
        rest = weights[:, weights.shape[1] // BLOCK * BLOCK :].sum(dim=1, keepdim=True, dtype=torch.float64)
        sums[some] = _blocks(weights).sum(dim=2).sum(dim=1, keepdim=True, dtype=torch.float64) + rest
    return sums


def _blocks(rows: Tensor) -> Tensor:
    """[n, size] -> [n, size // BLOCK, BLOCK], where it lies."""
    count = rows.shape[1] // BLOCK
    return rows[:, : count * BLOCK].view(rows.shape[0], count, BLOCK)
