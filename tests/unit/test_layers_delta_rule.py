"""The gated delta rule and its convolution, held against transformers' own in torch's operations."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.qwen3_5 import modeling_qwen3_5 as oracle

from lockstep_runtime.layers.causal_conv import convolve, plan_conv
from lockstep_runtime.layers.delta_rule import Inputs, advance_, plan_rule
from lockstep_runtime.layers.delta_rule_kernels import (
    TORCH,
    DeltaRule,
    choose_rule,
    flash_linear_attention,
    plan_packed,
    trial,
)

CPU = torch.device("cpu")
KEY_HEADS, HEADS, KEY_DIM, VALUE_DIM = 2, 6, 24, 20
CHANNELS, KERNEL = 10, 4
close = functools.partial(torch.testing.assert_close, atol=1e-5, rtol=0.0)


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(tokens: int, seed: int = 0) -> Inputs:
    return Inputs(
        queries=numbers(tokens, KEY_HEADS, KEY_DIM, seed=seed),
        keys=numbers(tokens, KEY_HEADS, KEY_DIM, seed=seed + 1),
        values=numbers(tokens, HEADS, VALUE_DIM, seed=seed + 2),
        decay=-2 * numbers(tokens, HEADS, seed=seed + 3).abs(),
        beta=numbers(tokens, HEADS, seed=seed + 4).sigmoid(),
    )


def part(inputs: Inputs, start: int, stop: int) -> Inputs:
    return Inputs(**{name: getattr(inputs, name)[start:stop] for name in Inputs.__slots__})


def states_of(sequences: int, seed: int = 9) -> Tensor:
    return numbers(sequences, HEADS, VALUE_DIM, KEY_DIM, seed=seed)


def by_transformers(inputs: Inputs, state: Tensor, function: Any = oracle.torch_chunk_gated_delta_rule) -> Any:
    """One sequence: answers [tokens, heads, value_dim] and the new state."""
    answers, advanced = function(
        *(x[None] for x in (inputs.queries, inputs.keys, inputs.values)),
        g=inputs.decay[None], beta=inputs.beta[None], initial_state=state.mT[None], output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    return answers[0], advanced[0].mT


def flash(function: Any) -> Any:
    """transformers' function with what flash-linear-attention's has beyond it: packed sequences, and values first."""

    def call(
        q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, beta: Tensor, initial_state: Tensor, output_final_state: bool,
        use_qk_l2norm_in_kernel: bool, state_v_first: bool, cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert output_final_state
        assert use_qk_l2norm_in_kernel
        assert state_v_first
        given = (q, k, v, g, beta)
        bounds = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
        if cu_seqlens is None:
            sequences = [tuple(x[one : one + 1] for x in given) for one in range(len(q))]
        else:
            sequences = [tuple(x[:, start:stop] for x in given) for start, stop in itertools.pairwise(bounds)]
        results = [
            function(
                *one[:3], g=one[3], beta=one[4], initial_state=state.mT[None], output_final_state=True,
                use_qk_l2norm_in_kernel=True,
            )
            for one, state in zip(sequences, initial_state, strict=True)
        ]  # fmt: skip
        answers = torch.cat([answer for answer, _ in results], 0 if cu_seqlens is None else 1)
        return answers, torch.cat([state for _, state in results]).mT

    return call


FLASH = flash_linear_attention(
    flash(oracle.torch_recurrent_gated_delta_rule), flash(oracle.torch_chunk_gated_delta_rule), dtype=torch.float32
)


@pytest.mark.parametrize("rule", [TORCH, FLASH], ids=lambda rule: rule.name)
@pytest.mark.parametrize(
    "lengths", [(1,), (1, 1, 1), (2,), (64,), (65, 128), (1, 130, 1, 64, 63, 2, 1), (200, 1)], ids=str
)
def test_a_step_of_several_sequences_equals_each_one_alone(rule: DeltaRule, lengths: tuple[int, ...]) -> None:
    inputs, before = inputs_of(sum(lengths)), states_of(len(lengths))
    after = before.clone()
    answers = rule.advance_(inputs, after, rule.plan(lengths, CPU))
    start = 0
    for index, length in enumerate(lengths):
        theirs, state = by_transformers(part(inputs, start, start + length), before[index])
        close(answers[start : start + length], theirs)
        close(after[index], state)
        start += length


def test_single_tokens_equal_the_recurrent_form() -> None:
    inputs, state = inputs_of(40), states_of(1)
    theirs, last = by_transformers(inputs, state[0], oracle.torch_recurrent_gated_delta_rule)
    for token in range(40):
        answers = advance_(part(inputs, token, token + 1), state, None)
        close(answers[0], theirs[token])
    close(state[0], last)


@given(cuts=st.lists(st.integers(1, 150), min_size=1, max_size=8))
@settings(deadline=None, max_examples=25)
def test_a_prompt_may_be_cut_anywhere(cuts: list[int]) -> None:
    whole, state = inputs_of(sum(cuts), seed=cuts[0]), states_of(1)
    expected_state = state.clone()
    expected = advance_(whole, expected_state, plan_rule([sum(cuts)], CPU))
    start = 0
    for length in cuts:
        answers = advance_(part(whole, start, start + length), state, plan_rule([length], CPU))
        close(answers, expected[start : start + length])
        start += length
    close(state, expected_state)


@pytest.mark.parametrize("most", [1.0, 30.0, 300.0])
def test_chunks_equal_single_tokens_where_some_of_them_decay_all_but_everything(most: float) -> None:
    tokens = 150
    inputs, resets = inputs_of(tokens), torch.rand(tokens, HEADS, generator=torch.Generator().manual_seed(5))
    decay = torch.where(resets < 0.3, -most * resets, -0.02 * resets)
    inputs = dataclasses.replace(inputs, decay=decay)
    chunked, single = states_of(1), states_of(1)
    answers = advance_(inputs, chunked, plan_rule([tokens], CPU))
    for token in range(tokens):
        close(answers[token : token + 1], advance_(part(inputs, token, token + 1), single, None))
    close(chunked, single)


def test_decay_to_nothing_and_keys_of_zeros_are_no_trouble() -> None:
    inputs = inputs_of(70)
    harsh = Inputs(
        queries=inputs.queries, keys=torch.zeros_like(inputs.keys), values=inputs.values,
        decay=torch.full_like(inputs.decay, -200.0), beta=torch.ones_like(inputs.beta),
    )  # fmt: skip
    for lengths in ([70], [1] * 70):
        state = states_of(len(lengths))
        answers = advance_(harsh, state, plan_rule(lengths, CPU))
        assert torch.equal(answers, torch.zeros_like(answers))
        assert torch.equal(state, torch.zeros_like(state))


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), kernel=st.integers(2, 5))
@settings(deadline=None, max_examples=50)
def test_a_convolution_goes_on_where_it_stopped(lengths: list[int], kernel: int) -> None:
    """The first half of each sequence's tokens was seen before."""
    weight = numbers(kernel, CHANNELS, seed=1)
    past = [numbers(kernel - 1 + index, CHANNELS, seed=index) for index in range(len(lengths))]
    new = [numbers(length, CHANNELS, seed=100 + index) for index, length in enumerate(lengths)]
    remembered = torch.stack([inputs[-(kernel - 1) :] for inputs in past])
    out, kept = convolve(torch.cat(new), remembered, weight, plan_conv(lengths, kernel, CPU))
    expected = []
    for before, after in zip(past, new, strict=True):
        inputs = torch.cat((before, after)).t()[None]
        expected.append(F.conv1d(inputs, weight.t()[:, None], groups=CHANNELS)[0].t()[-len(after) :])
        torch.testing.assert_close(kept[len(expected) - 1], inputs[0].t()[-(kernel - 1) :])
    close(out, torch.cat(expected))


def test_a_convolution_of_bfloat16_is_summed_in_float32() -> None:
    weight, x = numbers(KERNEL, CHANNELS, seed=1), numbers(6, CHANNELS, seed=2).bfloat16()
    for lengths in ([6], [1] * 6):
        remembered = numbers(len(lengths), KERNEL - 1, CHANNELS, seed=3).bfloat16()
        plan = plan_conv(lengths, KERNEL, CPU)
        out, kept = convolve(x, remembered, weight, plan)
        expected, _ = convolve(x.float(), remembered.float(), weight, plan)
        assert (out.dtype, kept.dtype) == (torch.float32, torch.bfloat16)
        close(out, expected)


def test_the_library_is_taken_only_if_its_numbers_are_right() -> None:
    good = (flash(oracle.torch_recurrent_gated_delta_rule), flash(oracle.torch_chunk_gated_delta_rule))
    assert trial(FLASH, CPU, torch.float32, KEY_DIM, VALUE_DIM) is None
    half = flash_linear_attention(*good, dtype=torch.bfloat16)
    assert trial(half, CPU, torch.bfloat16, KEY_DIM, VALUE_DIM) is None

    def wrong(*given: Any, **settings: Any) -> tuple[Tensor, Tensor]:
        answers, states = good[0](*given, **settings)
        return answers, states.mT.reshape(states.shape)  # as a version that doesn't know `state_v_first` would

    def broken(*given: Any, **settings: Any) -> tuple[Tensor, Tensor]:
        raise RuntimeError("no kernel image is available")

    mistaken = flash_linear_attention(wrong, good[1], dtype=torch.float32)
    assert trial(mistaken, CPU, torch.float32, KEY_DIM, VALUE_DIM) == "its result differs from the plain one's"
    failing = flash_linear_attention(good[0], broken, dtype=torch.float32)
    assert trial(failing, CPU, torch.float32, KEY_DIM, VALUE_DIM) == "RuntimeError: no kernel image is available"


def test_a_cpu_computes_by_torch() -> None:
    assert choose_rule(CPU, torch.bfloat16, KEY_DIM, VALUE_DIM) is TORCH
    assert plan_packed([1, 1], CPU) is None


def test_a_gpu_without_the_library_computes_by_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "fla", None)  # as if it were not installed
    with caplog.at_level("INFO"):
        assert choose_rule(torch.device("cuda"), torch.bfloat16, KEY_DIM, VALUE_DIM) is TORCH
    assert "delta-net layers are computed by torch's operations: ModuleNotFoundError" in caplog.text
