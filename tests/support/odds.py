"""The odds that a draw from a row of logits is another one from the same row rounded otherwise, in closed form."""

from __future__ import annotations

from torch import Tensor


def of_gumbel_draws(logits: Tensor, rounded: Tensor, temperature: float) -> float:
    """Both draws are the largest of logit / temperature + the same Gumbel noise.

    They are equal with probability sum_i 1 / sum_j max(p_j / p_i, q_j / q_i) (https://arxiv.org/abs/1809.04052, where
    it is called P-MinHash). By the order of q_i / p_i that takes a sort and two sums.
    """
    p, q = _softmax(logits, temperature), _softmax(rounded, temperature)
    possible = (p > 0) & (q > 0)
    p, q = p[possible], q[possible]
    ratios, order = (q / p).sort()
    p, q = p[order], q[order]
    above_p, above_q = _sums_above(p), _sums_above(q)
    excess = above_q / ratios - above_p  # of sum_j max(p_j, q_j p_i / q_i) over one
    return float((p * excess / (1 + excess)).sum())


def of_lookups(logits: Tensor, rounded: Tensor, temperature: float) -> float:
    """Both draws look the same uniform number up in the cumulated probabilities: equal where the intervals overlap."""
    p, q = _softmax(logits, temperature).cumsum(0), _softmax(rounded, temperature).cumsum(0)
    before_p, before_q = (one.roll(1).index_fill(0, one.new_zeros(1).long(), 0.0) for one in (p, q))
    overlap = (p.minimum(q) - before_p.maximum(before_q)).clamp(min=0)
    return 1 - float(overlap.sum())


def _softmax(logits: Tensor, temperature: float) -> Tensor:
    return (logits.double() / temperature).softmax(0)


def _sums_above(sorted_: Tensor) -> Tensor:
    """Of all that come later."""
    return sorted_.flip(0).cumsum(0).flip(0) - sorted_
