"""What top_k, top_p and min_p leave of a row of logits: all that is not below a border.

A rounding of the logits may move a token that lies at the border across it; it changes nothing for any other. What ties
with the last that is left stays in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from lockstep_runtime.protocol.step import SamplingParams

COLDEST: Final = 1e-5  # a lower temperature's noise is less than the rounding of a logit
NONE: Final = float("-inf")


def is_greedy(params: SamplingParams) -> bool:
    """Whether the likeliest token is drawn, the first of equals."""
    return params.temperature < COLDEST or params.top_k == 1


@dataclass(frozen=True, slots=True)
class Filters:
    """Of n rows: [n, 1] each, float64."""

    temperature: Tensor  # 0: greedy
    top_k: Tensor  # 0: off
    top_p: Tensor  # 1: off
    min_p: Tensor  # 0: off

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device) -> Filters:
        rows = [_GREEDY if is_greedy(one) else (one.temperature, one.top_k, one.top_p, one.min_p) for one in params]
        return cls(*torch.tensor(rows, dtype=torch.float64).to(device)[:, :, None].unbind(1))

    def rows(self, of: Tensor) -> Filters:
        return Filters(self.temperature[of], self.top_k[of], self.top_p[of], self.min_p[of])

    def needs_total(self) -> Tensor:
        """[n]: the rows for which `border` needs the sum of all tokens' weights."""
        return ((self.top_p < 1) & (self.top_k == 0))[:, 0]

    def border(self, values: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """The least logit that is left, and whether there were enough values to know it: [n, 1] each.

        values: [n, m], a row's likeliest from the largest on; total: [n, 1], the sum of all tokens' weights, as a
        multiple of the likeliest one's. top_k comes first, top_p is a share of what it leaves.
        """
        limited, divisor = self.top_k > 0, torch.where(self.temperature > 0, self.temperature, 1)
        kth = torch.where(limited, _at(values, self.top_k - 1), NONE)
        weights = ((values - values[:, :1]) / divisor).exp()
        reached = weights.masked_fill(values < kth, 0).cumsum(dim=1)
        short = reached < self.top_p * torch.where(limited, reached[:, -1:], total)
        border = torch.where(self.top_p < 1, kth.maximum(_at(values, short.sum(dim=1, keepdim=True))), kth)
        least = values[:, :1] + self.min_p.log() * self.temperature
        border = torch.where(self.min_p > 0, border.maximum(least.to(values.dtype)), border)
        last = values[:, -1:]
        return border, (last < torch.where(limited, kth, border)) | (last == NONE)


_GREEDY: Final = (0.0, 1, 1.0, 0.0)


def is_off(params: SamplingParams) -> bool:
    """Whether every token may be drawn."""
    return not is_greedy(params) and params.top_k <= 0 and params.top_p >= 1 and params.min_p <= 0


def _at(values: Tensor, place: Tensor) -> Tensor:
    """[n, m] and [n, 1] -> [n, 1]; beyond an end what stands there."""
    return values.gather(1, place.long().clamp(0, values.shape[1] - 1))
