"""A causal convolution over each channel alone (depthwise), and what it remembers of a sequence: its last inputs.

A sequence's inputs are what it remembers, [kernel - 1, channels], followed by its new tokens; an output is the weighted
sum of the last `kernel` of them. All sequences of a step are convolved at once, whatever their lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvPlan:
    """Of a step in which some sequences have several tokens: where inputs lie in a table of rows.

    The rows are what the sequences remember, one after the other, and then the step's tokens.
    """

    taps: Tensor  # [kernel, tokens]: what each output is a sum of, the oldest first
    kept: Tensor  # [sequences * (kernel - 1)]: what is remembered afterwards


def plan_conv(lengths: Sequence[int], kernel: int, device: torch.device) -> ConvPlan | None:
    """`lengths`: how many tokens each sequence has in the step. None where that is one."""
    if all(length == 1 for length in lengths):
        return None
    counts = torch.tensor(lengths)
    starts = counts.cumsum(0) - counts
    remembered, count = kernel - 1, len(lengths)

    def rows(sequence: Tensor, number: Tensor) -> Tensor:
        """Of a sequence's input of this number; what is remembered comes first."""
        new = count * remembered + starts[sequence] + number - remembered
        return torch.where(number < remembered, sequence * remembered + number, new)

    sequences = torch.arange(count)
    of_token = sequences.repeat_interleave(counts)
    offsets = torch.arange(len(of_token)) - starts[of_token]
    taps = rows(of_token[None], offsets[None] + torch.arange(kernel)[:, None])
    kept = rows(sequences[:, None], counts[:, None] + torch.arange(remembered)[None])
    return ConvPlan(taps=taps.to(device), kept=kept.view(-1).to(device))


def convolve(x: Tensor, remembered: Tensor, weight: Tensor, plan: ConvPlan | None) -> tuple[Tensor, Tensor]:
    """x: [tokens, channels]; remembered: [sequences, kernel - 1, channels]; weight: [kernel, channels], the oldest
    input's first, in float32.

    Returns [tokens, channels] in float32, and what is remembered now.
    """
    if plan is None:
        inputs = torch.cat((remembered, x[:, None]), 1)
        return (inputs * weight).sum(1), inputs[:, 1:]
    rows = torch.cat((remembered.flatten(0, 1), x))
    out = torch.zeros(x.shape, dtype=weight.dtype, device=x.device)
    for tap, factor in zip(plan.taps, weight, strict=True):
        out.addcmul_(rows.index_select(0, tap), factor)
    return out, rows.index_select(0, plan.kept).view(remembered.shape)
