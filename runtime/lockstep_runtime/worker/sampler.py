"""Samples tokens from logits, on rank 0.

A draw is the token with the largest logit / temperature + noise, where the noise is Gumbel's, hashed from (seed,
position, token id): that follows the softmax (https://arxiv.org/abs/1411.0030), needs no sort, and depends on nothing
else: not on the batch, on what was drawn before, or on a preemption or repair in between. Logits that were rounded
otherwise, as by another batch's shape, give another token only where the two best nearly tie.

A batch is drawn by a few operations on tensors. Where a filter leaves few tokens, as most do, only the likeliest are
looked at; rows whose filters leave more than were looked at are tried again with more of them.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from lockstep_runtime.protocol.step import SampledToken, SamplingParams, SequenceSlice
from lockstep_runtime.worker.filters import NONE, Filters, is_greedy, is_off
from lockstep_runtime.worker.gumbel import gumbel_noise, keys
from lockstep_runtime.worker.likeliest import Logits, check_finite, look_at, pieces, total_weight
from lockstep_runtime.worker.rules import RuledRow, adjust

TIES: Final = 16  # tokens that share the last place of top_k and are looked at with the others
LAST: Final = 2**31 - 1  # no token is beyond
ALL: Final = 0
FEW, MANY = 128, 4096  # likeliest tokens that are looked at, where top_k doesn't say how many


@dataclass(frozen=True, slots=True)
class Draw:
    """One token to sample; `position` is its own in its sequence."""

    sequence_id: int
    position: int
    params: SamplingParams


def draw_of(sequence: SequenceSlice) -> Draw:
    position = sequence.position + len(sequence.tokens)
    return Draw(sequence.sequence_id, position, sequence.sample or SamplingParams())


def is_plain_greedy(params: SamplingParams) -> bool:
    """Whether the likeliest token is all that is asked for."""
    return is_greedy(params) and params.logprobs < 0


def take_best(tokens: Tensor, logits: Tensor, draws: Sequence[Draw]) -> list[SampledToken]:
    """tokens and logits: [n], the likeliest token of each row and its logit.

    Raises:
        NonFiniteError: a NaN anywhere in a row shows in its maximum.
    """
    check_finite(logits[:, None])
    return [
        SampledToken(sequence_id=draw.sequence_id, token=token)
        for draw, token in zip(draws, tokens.tolist(), strict=True)
    ]


def sample(logits: Tensor, draws: Sequence[Draw], ruled: Sequence[RuledRow] = ()) -> list[SampledToken]:
    """logits: [n, vocabulary], float32, one row per draw; `ruled` rows of them may be changed.

    Raises:
        NonFiniteError: instead of drawing from garbage.
    """
    seen = look_at(logits)
    tokens = (_sample_by_rules(seen, draws, ruled) if ruled else Sampler(seen, draws).draw()).tolist()
    described = _log_probabilities(seen, tokens, draws)
    return [
        described.get(row) or SampledToken(sequence_id=draw.sequence_id, token=token)
        for row, (draw, token) in enumerate(zip(draws, tokens, strict=True))
    ]


def _sample_by_rules(logits: Logits, draws: Sequence[Draw], ruled: Sequence[RuledRow]) -> Tensor:
    """Rows whose log probabilities are asked for are afterwards as they were."""
    rows = torch.tensor([one.row for one in ruled], device=logits.rows.device)
    described = any(draws[one.row].params.logprobs >= 0 for one in ruled)
    unmodified = logits.rows[rows] if described else None
    adjust(logits.rows, ruled)
    logits.look_again(rows)
    tokens = Sampler(logits, draws).draw()
    if unmodified is not None:
        logits.rows[rows] = unmodified
        logits.look_again(rows)
    return tokens


class Sampler:
    """Draws of one batch."""

    def __init__(self, logits: Logits, draws: Sequence[Draw]) -> None:
        self._logits, self._device = logits, logits.rows.device
        self._params = [draw.params for draw in draws]
        self._filters = Filters.of(self._params, self._device)
        self._keys = keys([(draw.params.seed, draw.position) for draw in draws], self._device)
        self._tokens = torch.empty(len(draws), dtype=torch.int64, device=self._device)

    def draw(self) -> Tensor:
        """[n], int64."""
        counts = [_enough(params) for params in self._params]
        told = max((count for count in counts if 0 < count < FEW), default=1)
        by_top_k = self._draw_among(self._rows(counts, range(1, FEW)), told)
        others = self._draw_among(self._rows(counts, (FEW,)), FEW)
        left = self._draw_among(torch.cat((by_top_k, others)), MANY)
        left = torch.cat((left, self._rows(counts, (ALL,))))
        if len(left):
            self._draw_from_all(left)
        return self._tokens

    def _rows(self, counts: Sequence[int], wanted: Container[int]) -> Tensor:
        found = [row for row, count in enumerate(counts) if count in wanted]
        return torch.tensor(found, dtype=torch.int64, device=self._device)

    def _draw_among(self, rows: Tensor, count: int) -> Tensor:
        """rows: [m] -> those for which so many of the likeliest were not enough."""
        if not len(rows):
            return rows
        values, tokens = self._logits.likeliest(rows, count)
        filters = self._filters.rows(rows)
        border, known = filters.border(values, self._totals(rows, filters, values[:, :1]))
        scores = noisy(values.masked_fill_(values < border, NONE), tokens, self._keys[rows], filters)
        self._tokens[rows] = first_of_best(scores, tokens)
        return rows[~known[:, 0]]

    def _draw_from_all(self, rows: Tensor) -> None:
        """The same of the whole vocabulary."""
        everything = torch.arange(self._logits.rows.shape[1], dtype=torch.int32, device=self._device)[None]
        for some in pieces(self._logits.rows, len(rows)):
            of = rows[some]
            values, filters = self._logits.rows[of], self._filters.rows(of)
            if not all(is_off(self._params[row]) for row in of.tolist()):
                ordered = values.sort(dim=1, descending=True).values
                border, _ = filters.border(ordered, self._totals(of, filters, ordered[:, :1]))
                values.masked_fill_(values < border, NONE)
            self._tokens[of] = _argmax(noisy(values, everything, self._keys[of], filters))

    def _totals(self, rows: Tensor, filters: Filters, best: Tensor) -> Tensor:
        """[m, 1]: of the rows for which it matters."""
        totals = torch.ones_like(filters.top_p)
        if len(of := filters.needs_total().nonzero()[:, 0]):
            totals[of] = total_weight(self._logits.rows[rows[of]], best[of], filters.temperature[of])
        return totals


def _enough(params: SamplingParams) -> int:
    """How many of the likeliest are enough for most rows; 0: all are needed."""
    if is_off(params):
        return ALL
    if is_greedy(params):
        return 1 + TIES
    return min(params.top_k + TIES, FEW) if params.top_k > 0 else FEW


def noisy(logits: Tensor, tokens: Tensor, keys: Tensor, filters: Filters) -> Tensor:
    """logits: [n, m], tokens: [n or 1, m] -> [n, m], logit + temperature * noise: the largest is drawn."""
    return torch.addcmul(logits, gumbel_noise(keys, tokens), filters.temperature.to(logits.dtype))


def first_of_best(scores: Tensor, tokens: Tensor) -> Tensor:
    """[n, m] each -> [n]: of equals the first token, whatever their order."""
    return torch.where(scores == scores.amax(dim=1, keepdim=True), tokens, LAST).amin(dim=1)


def _argmax(scores: Tensor) -> Tensor:
    """[n, m] -> [n]: the first of equals."""
    if scores.is_cpu:  # where numpy's takes a tenth of the time that torch's does
        return torch.from_numpy(scores.numpy().argmax(axis=1))
    return scores.argmax(dim=1)


def _log_probabilities(logits: Logits, tokens: Sequence[int], draws: Sequence[Draw]) -> dict[int, SampledToken]:
    """For the rows that request them; the sampled token is always among the likeliest."""
    asked = [row for row, draw in enumerate(draws) if draw.params.logprobs >= 0]
    if not asked:
        return {}
    rows = torch.tensor(asked, device=logits.rows.device)
    best, likeliest = logits.likeliest(rows, max(1, *(draws[row].params.logprobs for row in asked), 1))
    drawn = logits.rows[rows, torch.tensor([tokens[row] for row in asked], device=rows.device)]
    whole = best[:, :1] + total_weight(logits.rows[rows], best[:, :1], torch.ones_like(best[:, :1])).log()
    columns = zip(asked, (drawn - whole[:, 0]).tolist(), likeliest.tolist(), (best - whole).tolist(), strict=True)
    return {
        row: _described(draws[row], tokens[row], logprob, list(zip(*both, strict=True)))
        for row, logprob, *both in columns
    }


def _described(draw: Draw, token: int, logprob: float, likeliest: list[tuple[int, float]]) -> SampledToken:
    top = likeliest[: draw.params.logprobs]
    if top and all(token != other for other, _ in top):
        top.append((token, logprob))
    return SampledToken(sequence_id=draw.sequence_id, token=token, logprob=logprob, top=top)
