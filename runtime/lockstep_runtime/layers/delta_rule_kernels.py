"""Ways to compute the gated delta rule, and which of them this machine can use.

On a GPU flash-linear-attention's kernels are tried where it is installed: on a small step, beside torch's own
operations, which have to do where it raises or gives other numbers.

Source: https://github.com/fla-org/flash-linear-attention, `fla.ops.gated_delta_rule` (its states may be laid out as
ours since 0.5: `state_v_first`).
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from lockstep_runtime.layers.delta_rule import Inputs, advance_, plan_rule
from lockstep_runtime.layers.trial import DIFFERS, failure_of, reason

logger = logging.getLogger(__name__)

TRIED_LENGTHS: Final = (1, 70, 1, 3)  # more than a chunk, less than one, and single tokens
TRIED_HEADS, TRIED_KEY_HEADS = 4, 2


@dataclass(frozen=True, slots=True)
class DeltaRule:
    """`plan` once a step, of every sequence's number of tokens; `advance_` in every layer, as `delta_rule.advance_`."""

    name: str
    plan: Callable[[Sequence[int], torch.device], Any]
    advance_: Callable[[Inputs, Tensor, Any], Tensor]


TORCH: Final = DeltaRule("torch", plan_rule, advance_)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedPlan:
    """Of a step in which some sequences have several tokens."""

    single: Tensor  # [n], the sequences of one token
    single_tokens: Tensor  # [n], where it is
    many: Tensor  # [m], the other sequences
    many_tokens: Tensor  # theirs, one sequence after the other
    bounds: Tensor  # [m + 1], where in them each begins and ends


def plan_packed(lengths: Sequence[int], device: torch.device) -> PackedPlan | None:
    """None where every sequence has one token."""
    counts = torch.tensor(lengths)
    if not bool((counts > 1).any()):
        return None
    starts, is_single = counts.cumsum(0) - counts, counts == 1
    many = counts[~is_single]
    return PackedPlan(
        single=is_single.nonzero()[:, 0].to(device),
        single_tokens=starts[is_single].to(device),
        many=(~is_single).nonzero()[:, 0].to(device),
        many_tokens=(~is_single).repeat_interleave(counts).nonzero()[:, 0].to(device),
        bounds=torch.cat((torch.zeros(1, dtype=torch.int64), many.cumsum(0))).to(device),
    )


class FlashLinearAttention:
    """`one_token` and `chunked` are the library's functions, or take and give the same."""

    def __init__(self, one_token: Callable[..., Any], chunked: Callable[..., Any], dtype: torch.dtype) -> None:
        """`dtype`: what queries, keys and values are given in."""
        self._one_token, self._chunked, self._dtype = one_token, chunked, dtype

    def advance_(self, inputs: Inputs, states: Tensor, plan: PackedPlan | None) -> Tensor:
        shared = inputs.values.shape[1] // inputs.keys.shape[1]
        queries, keys = (x.repeat_interleave(shared, 1) for x in (inputs.queries, inputs.keys))
        given = (*(x.to(self._dtype) for x in (queries, keys, inputs.values)), inputs.decay, inputs.beta)
        if plan is None:
            answers, advanced = self._call(self._one_token, (x[:, None] for x in given), states)
            states.copy_(advanced)
            return answers[:, 0]
        all_answers = torch.empty(inputs.values.shape, dtype=torch.float32, device=states.device)
        if len(plan.single):
            taken = (x.index_select(0, plan.single_tokens)[:, None] for x in given)
            answers, advanced = self._call(self._one_token, taken, states.index_select(0, plan.single))
            all_answers.index_copy_(0, plan.single_tokens, answers[:, 0])
            states.index_copy_(0, plan.single, advanced)
        taken = (x.index_select(0, plan.many_tokens)[None] for x in given)
        before = states.index_select(0, plan.many)
        answers, advanced = self._call(self._chunked, taken, before, cu_seqlens=plan.bounds)
        all_answers.index_copy_(0, plan.many_tokens, answers[0])
        states.index_copy_(0, plan.many, advanced)
        return all_answers

    @staticmethod
    def _call(function: Callable[..., Any], given: Any, states: Tensor, **more: Tensor) -> tuple[Tensor, Tensor]:
        queries, keys, values, decay, beta = given
        answers, advanced = function(
            queries, keys, values, g=decay, beta=beta, initial_state=states, output_final_state=True,
            use_qk_l2norm_in_kernel=True, state_v_first=True, **more,
        )  # fmt: skip
        return answers.float(), advanced.float()


def choose_rule(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> DeltaRule:
    """The fastest way that works here; `dtype`: of hidden states."""
    if device.type != "cuda":
        return TORCH
    try:
        library: Any = importlib.import_module("fla.ops.gated_delta_rule")
        functions = (library.fused_recurrent_gated_delta_rule, library.chunk_gated_delta_rule)
        rule = flash_linear_attention(*functions, dtype=dtype)
    except Exception as error:  # not installed, or whatever it raises on this machine
        logger.info("delta-net layers are computed by torch's operations: %s", reason(error))
        return TORCH
    if failure := trial(rule, device, dtype, key_dim, value_dim):
        logger.warning("delta-net layers are slower here: no flash-linear-attention: %s", failure)
        return TORCH
    return rule


def flash_linear_attention(
    one_token: Callable[..., Any], chunked: Callable[..., Any], *, dtype: torch.dtype
) -> DeltaRule:
    return DeltaRule("flash-linear-attention", plan_packed, FlashLinearAttention(one_token, chunked, dtype).advance_)


def trial(rule: DeltaRule, device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> str | None:
    """Take a small step both ways; returns what is wrong."""
    return failure_of(lambda: _failure(rule, device, dtype, key_dim, value_dim))


@torch.inference_mode()
def _failure(rule: DeltaRule, device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> str | None:
    inputs, states = _tried(dtype, key_dim, value_dim, device)
    expected_states = states.clone()
    found = rule.advance_(inputs, states, rule.plan(TRIED_LENGTHS, device))
    expected = TORCH.advance_(inputs, expected_states, TORCH.plan(TRIED_LENGTHS, device))
    tolerance = 8 * torch.finfo(dtype).eps  # of answers and states of about one
    pairs = ((found, expected), (states, expected_states))
    right = all(torch.allclose(one, other, rtol=tolerance, atol=tolerance) for one, other in pairs)
    return None if right else DIFFERS


def _tried(dtype: torch.dtype, key_dim: int, value_dim: int, device: torch.device) -> tuple[Inputs, Tensor]:
    generator, tokens = torch.Generator().manual_seed(0), sum(TRIED_LENGTHS)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    inputs = Inputs(
        queries=numbers(tokens, TRIED_KEY_HEADS, key_dim).to(dtype),
        keys=numbers(tokens, TRIED_KEY_HEADS, key_dim).to(dtype),
        values=numbers(tokens, TRIED_HEADS, value_dim).to(dtype),
        decay=-numbers(tokens, TRIED_HEADS).abs(),
        beta=numbers(tokens, TRIED_HEADS).sigmoid(),
    )
    return inputs, numbers(len(TRIED_LENGTHS), TRIED_HEADS, value_dim, key_dim)
