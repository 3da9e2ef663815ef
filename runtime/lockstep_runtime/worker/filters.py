"""What top_k, top_p and min_p leave of a row of logits.

Each rules out what lies below a border. A rounding of the logits may move a token that lies at the border across it;
it changes nothing for any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from lockstep_runtime.protocol.step import SamplingParams

NONE: Final = float("-inf")
NUCLEUS_GUESS: Final = 1024  # likeliest tokens tried for top_p before the whole vocabulary is sorted
TIES: Final = 16  # tokens that may share the last place of top_k and stay in

Filter = Callable[[Tensor, Sequence[SamplingParams]], tuple[Tensor, Tensor]]
"""logits [n, vocabulary] and n parameters -> logits [n, m], minus infinity where ruled out; and whose they are, [n, m],
or [1, m] where every row has the same tokens."""


def filter_for(params: SamplingParams) -> Filter:
    """One for all rows that it is given for."""
    if params.top_k > 0:
        return among_top_k
    return in_nucleus if params.top_p < 1 else above_min_p


def above_min_p(logits: Tensor, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    allowed = logits
    if any(one.min_p > 0 for one in params):
        allowed = _apply_min_p(logits, logits.amax(dim=1, keepdim=True), params)
    return allowed, torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device)[None]


def among_top_k(logits: Tensor, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    """The k likeliest, and those that tie with the k-th; then top_p and min_p of these."""
    size = logits.shape[1]
    last = [min(one.top_k, size) - 1 for one in params]
    values, tokens = logits.topk(min(max(last) + 1 + TIES, size))
    border = values.gather(1, torch.tensor(last, device=logits.device)[:, None])
    allowed = values.masked_fill(values < border, NONE)
    total = _weights(allowed, allowed[:, :1], params).sum(dim=1, keepdim=True)
    return _apply_top_p(allowed, total, params), tokens


def in_nucleus(logits: Tensor, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    values, tokens = logits.topk(min(NUCLEUS_GUESS, logits.shape[1]))
    total = _weights(logits, values[:, :1], params).sum(dim=1, keepdim=True)
    reached = _weights(values, values[:, :1], params).sum(dim=1, keepdim=True) / total
    if bool((reached < column(params, "top_p", logits)).any()):
        values, tokens = logits.sort(dim=1, descending=True)
    return _apply_top_p(values, total, params), tokens


def _apply_top_p(values: Tensor, total: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """values: [n, m], descending; total: [n, 1], the sum of the weights of which top_p is a share.

    Leaves the fewest that reach it, and what ties with the last of them; then min_p of these.
    """
    reached = _weights(values, values[:, :1], params).cumsum(dim=1, dtype=torch.float64) / total
    top_p = column(params, "top_p", values)
    needed = ((reached < top_p) | (top_p >= 1)).sum(dim=1, keepdim=True).clamp_(max=values.shape[1] - 1)
    allowed = values.masked_fill(values < values.gather(1, needed), NONE)
    return _apply_min_p(allowed, values[:, :1], params)


def _apply_min_p(logits: Tensor, best: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    border = column(params, "min_p", logits).log_().mul_(column(params, "temperature", logits))
    return logits.masked_fill(logits < best + border, NONE)


def _weights(logits: Tensor, best: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Probabilities, as multiples of the likeliest one's; best: [n, 1], its logit."""
    return ((logits - best) / column(params, "temperature", logits)).exp_()


def column(params: Sequence[SamplingParams], name: str, like: Tensor) -> Tensor:
    """A parameter of every row: [n, 1]."""
    return torch.tensor([[getattr(one, name)] for one in params], dtype=like.dtype, device=like.device)
