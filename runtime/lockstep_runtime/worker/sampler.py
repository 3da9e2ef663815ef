"""Drawing tokens from logits, on rank 0.

A draw depends on the row's logits, its parameters, its seed and its position, and on nothing else: one uniform number
is hashed from (seed, position) and looked up in the cumulated probabilities. So a continuation does not depend on the
batch, on what was drawn before, or on a preemption or repair in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from lockstep_runtime.wire import SampledToken, SamplingParams, SequenceSlice

MASK: Final = (1 << 64) - 1
NUCLEUS_GUESS: Final = 1024  # likeliest tokens tried for top_p before the whole vocabulary is sorted


class NonFiniteError(ArithmeticError):
    """The logits hold a NaN or an infinity: some rank computed garbage."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One token to be drawn: `position` is the one it will have in its sequence."""

    sequence_id: int
    position: int
    params: SamplingParams


def draw_of(sequence: SequenceSlice) -> Draw:
    position = sequence.position + len(sequence.tokens)
    return Draw(sequence.sequence_id, position, sequence.sample or SamplingParams())


def is_plain_greedy(params: SamplingParams) -> bool:
    """Whether the likeliest token is all that is asked for."""
    return (params.temperature <= 0 or params.top_k == 1) and params.logprobs < 0


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
    greedy = logits.argmax(dim=-1).tolist()
    return [
        _describe(
            logits[row], draw.sequence_id, _draw(logits[row], greedy[row], draw.position, draw.params), draw.params
        )
        for row, draw in enumerate(draws)
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


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, from (seed, position) alone.

    SplitMix64's finalizer, twice (https://doi.org/10.1145/2660193.2660195): once to spread the seed, so that streams of
    neighbouring seeds have nothing in common, once for the position in its stream.
    """
    return (_mix((_mix(seed & MASK) + (position + 1) * 0x9E3779B97F4A7C15) & MASK) >> 11) * 2.0**-53


def _mix(state: int) -> int:
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def _draw(logits: Tensor, greedy: int, position: int, params: SamplingParams) -> int:
    if params.temperature <= 0 or params.top_k == 1:
        return greedy
    scores = logits.double() / params.temperature if params.temperature < 0.1 else logits / params.temperature
    kept = _filter(scores, params)
    # In float64: 150,000 small probabilities are summed, and a draw must not depend on their rounding.
    cumulated = (kept - kept.max()).double().exp().cumsum(0)
    target = uniform(params.seed, position) * float(cumulated[-1])
    index = int(torch.searchsorted(cumulated, target, right=True))
    return min(index, int((kept > float("-inf")).nonzero()[-1])) if index >= len(kept) else index


def _filter(scores: Tensor, params: SamplingParams) -> Tensor:
    """The scores with what top_k, top_p and min_p rule out at minus infinity; ties at the border stay in."""
    threshold = float("-inf")
    if 0 < params.top_k < len(scores):
        threshold = float(scores.topk(params.top_k).values[-1])
    if params.top_p < 1:
        allowed = scores if threshold == float("-inf") else scores.masked_fill(scores < threshold, float("-inf"))
        threshold = max(threshold, _nucleus(allowed, params.top_p))
    if params.min_p > 0:
        threshold = max(threshold, float(scores.max() + torch.log(torch.tensor(params.min_p, dtype=torch.float64))))
    return scores if threshold == float("-inf") else scores.masked_fill(scores < threshold, float("-inf"))


def _nucleus(scores: Tensor, top_p: float) -> float:
    """The lowest score in the smallest set of likeliest tokens whose probability reaches top_p."""
    total = scores.double().logsumexp(0)
    for count in (min(NUCLEUS_GUESS, len(scores)), len(scores)):
        likeliest = scores.topk(count).values
        reached = (likeliest.double() - total).exp().cumsum(0)
        if count == len(scores) or float(reached[-1]) >= top_p:
            break
    return float(likeliest[min(int(torch.searchsorted(reached, top_p)), count - 1)])


def _describe(logits: Tensor, sequence_id: int, token: int, params: SamplingParams) -> SampledToken:
    if params.logprobs < 0:
        return SampledToken(sequence_id=sequence_id, token=token)
    logprobs = logits - logits.logsumexp(0)
    best = logprobs.topk(min(params.logprobs, len(logprobs)))
    return SampledToken(
        sequence_id=sequence_id,
        token=token,
        logprob=float(logprobs[token]),
        top=list(zip(best.indices.tolist(), best.values.tolist(), strict=True)),
    )
