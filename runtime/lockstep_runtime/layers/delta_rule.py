"""The gated delta rule (https://arxiv.org/abs/2412.06464): one token of every sequence at once, or chunks of tokens.

A head's state S, [value_dim, key_dim], is what it would answer to every key. With each token it decays, and is then put
right where it gives the token's key another value than the token's own:

    S ← exp(decay) · S;  S ← S + beta · (v - S k) ⊗ k;  answer = S q

The tokens of a chunk are put right together: what each corrects depends on those before it in the chunk, which is a
triangular system of equations (https://arxiv.org/abs/2406.06484, and section 3.3 of the paper above). Everything is
computed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

CHUNK: Final = 64  # tokens: the system grows with its square, and what is done once a chunk becomes rarer
EPSILON: Final = 1e-6  # within the root


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Of a step's tokens. `value_heads / key_heads` value heads, side by side, share a key head."""

    queries: Tensor  # [tokens, key_heads, key_dim]; those and keys are brought to unit length by the rule
    keys: Tensor
    values: Tensor  # [tokens, value_heads, value_dim]
    decay: Tensor  # [tokens, value_heads], float32: a logarithm, never above 0
    beta: Tensor  # [tokens, value_heads], float32: from 0 to 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Wave:
    """The chunks of the first n of a plan's `many` that are computed together."""

    tokens: Tensor  # [n, CHUNK]; behind a sequence's end its last token again
    places: Tensor  # [n, CHUNK]: where the answers go; behind a sequence's end that is a row behind all tokens
    valid: Tensor  # [n, 1, CHUNK]: 1.0, or 0.0 behind a sequence's end


@dataclass(frozen=True, slots=True, kw_only=True)
class RulePlan:
    """Of a step in which some sequences have several tokens."""

    single: Tensor  # [n], the sequences of one token
    single_tokens: Tensor  # [n], where it is
    many: Tensor  # [m], the other sequences, the longest first
    waves: tuple[Wave, ...]


def plan_rule(lengths: Sequence[int], device: torch.device) -> RulePlan | None:
    """`lengths`: how many tokens each sequence has in the step. None where that is one.

    Made on the host, so that nobody waits for the device.
    """
    single = [index for index, length in enumerate(lengths) if length == 1]
    many = sorted((index for index, length in enumerate(lengths) if length > 1), key=lambda index: -lengths[index])
    if not many:
        return None
    stops = torch.tensor(lengths).cumsum(0)
    starts = stops - torch.tensor(lengths)
    longest = range(0, lengths[many[0]], CHUNK)
    return RulePlan(
        single=torch.tensor(single, dtype=torch.int64, device=device),
        single_tokens=starts[single].to(device),
        many=torch.tensor(many, device=device),
        waves=tuple(_wave(starts[many] + first, stops[many], sum(lengths), device) for first in longest),
    )


def _wave(starts: Tensor, stops: Tensor, tokens: int, device: torch.device) -> Wave:
    count = int((starts < stops).sum())
    wanted = starts[:count, None] + torch.arange(CHUNK)
    stops = stops[:count, None]
    valid = wanted < stops
    return Wave(
        tokens=torch.minimum(wanted, stops - 1).to(device),
        places=torch.where(valid, wanted, tokens).to(device),
        valid=valid[:, None].float().to(device),
    )


_Rule = tuple[Tensor, ...]  # queries, keys, values, decay, beta, each [tokens, value_heads, ...]


def advance_(inputs: Inputs, states: Tensor, plan: RulePlan | None) -> Tensor:
    """states: [sequences, value_heads, value_dim, key_dim], which become the new ones.

    Returns the answers, [tokens, value_heads, value_dim], in float32.
    """
    shared = inputs.values.shape[1] // inputs.keys.shape[1]
    queries, keys = (of_unit_length(x).repeat_interleave(shared, 1) for x in (inputs.queries, inputs.keys))
    rule = (queries * keys.shape[-1] ** -0.5, keys, inputs.values.float(), inputs.decay, inputs.beta)
    if plan is None:
        return one_token_(rule, states)
    tokens, heads, width = rule[2].shape
    answers = torch.empty(tokens + 1, heads, width, device=states.device)
    if len(plan.single):
        taken = states.index_select(0, plan.single)
        one = one_token_(tuple(x.index_select(0, plan.single_tokens) for x in rule), taken)
        answers.index_copy_(0, plan.single_tokens, one)
        states.index_copy_(0, plan.single, taken)
    taken = states.index_select(0, plan.many)
    for wave in plan.waves:
        answers[wave.places] = _chunk_(rule, taken[: len(wave.tokens)], wave)
    states.index_copy_(0, plan.many, taken)
    return answers[:tokens]


def one_token_(rule: _Rule, states: Tensor) -> Tensor:
    """One token of each of the sequences; the state is read once, and then decays and is corrected.

    What the corrected state answers follows from what the old one did: (S + c ⊗ k) q = S q + c (k · q).
    """
    queries, keys, values, decay, beta = rule
    sequences, heads, width = values.shape
    # as rows, which oneMKL multiplies by five times as fast on a CPU as by the same numbers in two columns
    asked = torch.stack((keys, queries), -2).view(sequences * heads, 2, -1)
    kept = decay.exp()[..., None, None]
    seen = torch.bmm(states.view(sequences * heads, width, -1), asked.mT).view(sequences, heads, width, 2) * kept
    corrections = (values - seen[..., 0]) * beta[..., None]
    states.mul_(kept).addcmul_(corrections[..., None], keys[..., None, :])
    return seen[..., 1] + corrections * (keys * queries).sum(-1, keepdim=True)


def _chunk_(rule: _Rule, states: Tensor, wave: Wave) -> Tensor:
    """Answers: [n, CHUNK, heads, value_dim]. What stands behind a sequence's end neither decays nor corrects."""
    queries, keys, values, decay, beta = (x[wave.tokens].transpose(1, 2) for x in rule)  # [n, heads, CHUNK, ...]
    beta, decay = (beta * wave.valid)[..., None], (decay * wave.valid)[..., None]
    kept, from_start = _kept(decay), decay.cumsum(-2).exp()
    system = (keys * beta) @ keys.mT * kept
    unexplained = (values - from_start * (keys @ states.mT)) * beta
    corrections: Tensor = torch.linalg.solve_triangular(system, unexplained, upper=False, unitriangular=True)
    answers = from_start * (queries @ states.mT) + (queries @ keys.mT * kept) @ corrections
    states.mul_(from_start[..., -1:, :]).add_(corrections.mT @ (keys * kept[..., -1, :, None]))
    return answers.transpose(1, 2)


def _kept(decay: Tensor) -> Tensor:
    """decay: [..., CHUNK, 1] -> what is left at a token, by row, of what an earlier one put there, by column.

    Each sum is taken from the one to the other: the difference of two sums from the start would be inexact where
    something between the start and the two decays a lot.
    """
    one = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=decay.device)
    between = decay.expand(*decay.shape[:-1], CHUNK).masked_fill(~one.tril(-1), 0.0).cumsum(-2)
    return between.masked_fill_(one.triu(1), -torch.inf).exp_()


def of_unit_length(x: Tensor) -> Tensor:
    """Along the last dimension, in float32; a zero stays one."""
    x = x.float()
    return x * (x.square().sum(-1, keepdim=True) + EPSILON).rsqrt()
