"""Samples tokens from logits, on rank 0.

A draw is the token with the largest logit / temperature + noise, where the noise is Gumbel's, hashed from (seed,
position, token id): that follows the softmax (https://arxiv.org/abs/1411.0030), needs no sort, and depends on nothing
else: not on the batch, on what was drawn before, or on a preemption or repair in between. Logits that were rounded
otherwise, as by another batch's shape, give another token only where the two best nearly tie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from lockstep_runtime.protocol.step import SampledToken, SamplingParams, SequenceSlice
from lockstep_runtime.worker.filters import Filter, column, filter_for
from lockstep_runtime.worker.gumbel import gumbel_noise, keys

COLDEST: Final = 1e-5  # a lower temperature's noise is less than the rounding of a logit
CACHED: Final = 1 << 16  # logits that are worked on at once on a CPU: what is computed of them stays in a core's cache


class NonFiniteError(ArithmeticError):
    """The logits hold a NaN or an infinity: some rank computed garbage."""


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
    return _is_greedy(params) and params.logprobs < 0


def _is_greedy(params: SamplingParams) -> bool:
    return params.temperature < COLDEST or params.top_k == 1


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


def sample(logits: Tensor, draws: Sequence[Draw]) -> list[SampledToken]:
    """logits: [n, vocabulary], float32, one row per draw.

    Raises:
        NonFiniteError: instead of drawing from garbage.
    """
    check_finite(logits)
    tokens = torch.empty(len(draws), dtype=torch.int64, device=logits.device)
    at_once = max(1, CACHED // logits.shape[1]) if logits.is_cpu else len(draws)
    for wanted, rows in _by_filter(draws).items():
        for start in range(0, len(rows), at_once):
            some = rows[start : start + at_once]
            side_by_side = some[-1] - some[0] < len(some)  # then they need no copy
            part = logits[some[0] : some[-1] + 1] if side_by_side else logits[some]
            tokens[some] = _draw(part, wanted, [draws[row] for row in some])
    drawn = tokens.tolist()
    described = _log_probabilities(logits, drawn, draws)
    return [
        described.get(row) or SampledToken(sequence_id=draw.sequence_id, token=token)
        for row, (draw, token) in enumerate(zip(draws, drawn, strict=True))
    ]


def check_finite(rows: Tensor, what: str = "logits") -> None:
    """rows: [sequences, n].

    Raises:
        NonFiniteError: naming how many rows are bad.
    """
    if not bool(torch.isfinite(rows.sum())):  # one pass; a sum that overflows is looked at again
        bad = int((~torch.isfinite(rows)).any(dim=-1).sum())
        if bad:
            raise NonFiniteError(f"the {what} of {bad} of {rows.shape[0]} sequences hold NaN or infinity")


def _by_filter(draws: Sequence[Draw]) -> dict[Filter | None, list[int]]:
    """The rows of each; None: the likeliest token."""
    found: dict[Filter | None, list[int]] = {}
    for row, draw in enumerate(draws):
        found.setdefault(None if _is_greedy(draw.params) else filter_for(draw.params), []).append(row)
    return found


def _draw(logits: Tensor, wanted: Filter | None, draws: Sequence[Draw]) -> Tensor:
    """logits: [n, vocabulary] -> tokens [n]."""
    if wanted is None:
        return _argmax(logits)
    allowed, tokens = wanted(logits, [draw.params for draw in draws])
    best = largest(allowed, tokens, draws)
    return tokens.expand(len(draws), -1).gather(1, best[:, None])[:, 0].long()


def largest(logits: Tensor, tokens: Tensor, draws: Sequence[Draw]) -> Tensor:
    """logits: [n, m], tokens: [n or 1, m] -> [n], where logit + temperature * noise is largest."""
    noise = gumbel_noise(keys([(draw.params.seed, draw.position) for draw in draws], logits.device), tokens)
    temperature = column([draw.params for draw in draws], "temperature", logits)
    return _argmax(torch.addcmul(logits, noise, temperature))


def _argmax(scores: Tensor) -> Tensor:
    """[n, m] -> [n]: the first of equals."""
    if scores.is_cpu:  # where numpy's takes a tenth of the time that torch's does
        return torch.from_numpy(scores.numpy().argmax(axis=1))
    return scores.argmax(dim=1)


def _log_probabilities(logits: Tensor, tokens: Sequence[int], draws: Sequence[Draw]) -> dict[int, SampledToken]:
    """For the rows that request them; the sampled token is always among the likeliest."""
    rows = [row for row, draw in enumerate(draws) if draw.params.logprobs >= 0]
    if not rows:
        return {}
    asked = logits[rows].log_softmax(dim=1)
    drawn = asked.gather(1, torch.tensor([[tokens[row]] for row in rows], device=logits.device))[:, 0].tolist()
    best = asked.topk(min(max(draws[row].params.logprobs for row in rows), asked.shape[1]))
    likeliest = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return {
        row: _described(draws[row], tokens[row], logprob, list(zip(*both, strict=True)))
        for row, logprob, both in zip(rows, drawn, likeliest, strict=True)
    }


def _described(draw: Draw, token: int, logprob: float, likeliest: list[tuple[int, float]]) -> SampledToken:
    top = likeliest[: draw.params.logprobs]
    if top and all(token != other for other, _ in top):
        top.append((token, logprob))
    return SampledToken(sequence_id=draw.sequence_id, token=token, logprob=logprob, top=top)
