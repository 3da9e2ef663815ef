"""What `LogitRules` change in the rows of a batch: biases, penalties, tokens that may not be drawn yet.

The order and the formulas are vLLM's (`Sampler.apply_logits_processors`, `apply_penalties`), and the repetition penalty
is that of https://arxiv.org/abs/1909.05858. In place, and by a few operations on tensors for all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lockstep_runtime.grammar.matcher import Mask
from lockstep_runtime.protocol.step import LogitRules
from lockstep_runtime.worker.filters import NONE


class Seen:
    """The tokens that penalties are for, each once, with how often the answer has it."""

    def __init__(self) -> None:
        self._tokens = np.empty(64, dtype=np.int64)
        self._counts = np.zeros(64, dtype=np.float32)
        self._size = 0

    @property
    def tokens(self) -> NDArray[np.int64]:
        return self._tokens[: self._size]

    @property
    def counts(self) -> NDArray[np.float32]:
        """0: it is only in the prompt."""
        return self._counts[: self._size]

    def add(self, tokens: Sequence[int], *, drawn: bool) -> None:
        found, counts = np.unique(np.asarray(tokens, dtype=np.int64), return_counts=True)
        _, places, of_known = np.intersect1d(self.tokens, found, assume_unique=True, return_indices=True)
        new = np.delete(found, of_known)
        self._grow(len(new))
        self._tokens[self._size : self._size + len(new)] = new
        if drawn:
            self._counts[places] += counts[of_known]
            self._counts[self._size : self._size + len(new)] = np.delete(counts, of_known)
        self._size += len(new)

    def _grow(self, by: int) -> None:
        if (needed := self._size + by) > len(self._tokens):
            room = np.zeros(2 * needed, dtype=np.int64), np.zeros(2 * needed, dtype=np.float32)
            room[0][: self._size], room[1][: self._size] = self.tokens, self.counts
            self._tokens, self._counts = room


@dataclass(frozen=True, slots=True, kw_only=True)
class RuledRow:
    """One row of the logits."""

    row: int
    rules: LogitRules
    drawn: int  # tokens of the answer so far
    seen: Seen
    mask: Mask | None = None  # of the tokens that its grammar allows

    @property
    def may_end(self) -> bool:
        """A grammar that is complete comes before a least number of tokens."""
        return self.drawn >= self.rules.min_tokens or (self.mask is not None and self.mask.must_end)


def adjust(logits: Tensor, ruled: Sequence[RuledRow]) -> None:
    """logits: [n, vocabulary]."""
    _add_biases(logits, ruled)
    _rule_out_ends(logits, ruled)
    _penalize(logits, [one for one in ruled if one.rules.penalizes])
    _rule_out_the_unmatched(logits, ruled)


def _add_biases(logits: Tensor, ruled: Sequence[RuledRow]) -> None:
    places = [(one.row, token, value) for one in ruled for token, value in one.rules.bias.items()]
    if places:
        rows, tokens, values = zip(*places, strict=True)
        index = torch.tensor([rows, tokens], device=logits.device)
        logits[index[0], index[1]] += torch.tensor(values, dtype=logits.dtype, device=logits.device)


def _rule_out_ends(logits: Tensor, ruled: Sequence[RuledRow]) -> None:
    places = [(one.row, token) for one in ruled if not one.may_end for token in one.rules.end_ids]
    places += [(one.row, token) for one in ruled if one.mask for token in one.mask.never]
    if places:
        index = torch.tensor(places, device=logits.device)
        logits[index[:, 0], index[:, 1]] = NONE


def _rule_out_the_unmatched(logits: Tensor, ruled: Sequence[RuledRow]) -> None:
    masks = [(one.row, one.mask.bits) for one in ruled if one.mask is not None and one.mask.bits is not None]
    if masks:
        bits = np.stack([np.frombuffer(mask, dtype=np.uint8) for _, mask in masks])
        allowed = np.unpackbits(bits, axis=1, count=logits.shape[1], bitorder="little").view(np.bool_)
        rows = torch.tensor([row for row, _ in masks], device=logits.device)
        logits[rows] = logits[rows].masked_fill_(~torch.from_numpy(allowed).to(logits.device), NONE)


def _penalize(logits: Tensor, ruled: Sequence[RuledRow]) -> None:
    if not ruled:
        return
    sizes = [len(one.seen.tokens) for one in ruled]
    index = np.stack((np.repeat([one.row for one in ruled], sizes), np.concatenate([one.seen.tokens for one in ruled])))
    rows, tokens = torch.from_numpy(index).to(logits.device)
    rules = [(one.rules.repetition_penalty, one.rules.frequency_penalty, one.rules.presence_penalty) for one in ruled]
    factors = np.repeat(np.asarray(rules, dtype=np.float32), sizes, axis=0)
    counts = np.concatenate([one.seen.counts for one in ruled])
    taken = factors[:, 1] * counts + factors[:, 2] * (counts > 0)
    repetition, taken_off = torch.from_numpy(np.stack((factors[:, 0], taken))).to(logits.device)
    values = logits[rows, tokens]
    logits[rows, tokens] = torch.where(values > 0, values / repetition, values * repetition) - taken_off
