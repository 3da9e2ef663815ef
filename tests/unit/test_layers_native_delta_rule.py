"""The gated delta rule in C: against its definition in float64, from slot to slot, and bit by bit against itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lockstep_runtime.layers import native_delta_rule
from lockstep_runtime.layers.delta_rule import EPSILON, Inputs
from lockstep_runtime.layers.native.library import LEVELS, load
from lockstep_runtime.layers.native_delta_rule import native_step, step_by

HIGHEST = torch.backends.cpu.get_cpu_capability()
USABLE = [level for level in LEVELS if HIGHEST in LEVELS and list(LEVELS).index(level) >= list(LEVELS).index(HIGHEST)]
SHAPES = [(1, 1, 128, 128), (2, 4, 128, 64), (2, 6, 24, 20), (3, 3, 7, 1)]  # key heads, heads, their widths
SLOTS = 9
READS, WRITES = torch.tensor([0, 3, 4]), torch.tensor([1, 8, 2])


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(shape: tuple[int, int, int, int], sequences: int = 3) -> Inputs:
    """As a layer gives them: parts of wider rows."""
    key_heads, heads, width, rows = shape
    queries, keys = numbers(sequences, 2, key_heads, width, seed=1).unbind(1)
    return Inputs(
        queries=queries, keys=keys, values=numbers(sequences, heads + 1, rows, seed=2)[:, :heads],
        decay=-2 * numbers(sequences, heads, seed=3).abs(), beta=numbers(sequences, heads, seed=4).sigmoid(),
    )  # fmt: skip


def states_of(shape: tuple[int, int, int, int]) -> Tensor:
    states = numbers(SLOTS, shape[1], shape[3], shape[2], seed=5)
    states[0] = 0.0
    return states


def exact(inputs: Inputs, states: Tensor) -> tuple[Tensor, Tensor]:
    """Answers and new states in float64, by the definition; states: [sequences, ...]."""
    shared = inputs.values.shape[1] // inputs.keys.shape[1]
    queries, keys = (
        (x / (x.square().sum(-1, keepdim=True) + EPSILON).sqrt()).repeat_interleave(shared, 1)
        for x in (inputs.queries.double(), inputs.keys.double())
    )
    kept = inputs.decay.double().exp()[..., None, None] * states.double()
    told = torch.einsum("shrd,shd->shr", kept, keys)
    correction = (inputs.values.double() - told) * inputs.beta.double()[..., None]
    new = kept + correction[..., None] * keys[..., None, :]
    return torch.einsum("shrd,shd->shr", new, queries * queries.shape[-1] ** -0.5), new


@pytest.mark.parametrize("level", USABLE)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_follows_the_rule_and_writes_only_where_it_should(shape: tuple[int, int, int, int], level: str) -> None:
    inputs, states = inputs_of(shape), states_of(shape)
    before = states.clone()
    answers = step_by(load(torch.float32, level))(inputs, states, READS, WRITES)
    expected, new = exact(inputs, before[READS])
    torch.testing.assert_close(answers.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states[WRITES].double(), new, rtol=1e-5, atol=1e-5)
    others = [slot for slot in range(SLOTS) if slot not in WRITES]
    assert torch.equal(states[others], before[others])


def test_a_repeated_step_writes_the_same_bits_as_do_other_batches_and_threads() -> None:
    shape = (2, 4, 128, 64)
    inputs, states = inputs_of(shape), states_of(shape)
    step, threads = step_by(load(torch.float32)), torch.get_num_threads()
    answers = step(inputs, states, READS, WRITES)
    written = states[WRITES].clone()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(step(inputs, states, READS, WRITES), answers)
            assert torch.equal(states[WRITES], written)
    finally:
        torch.set_num_threads(threads)
    for row in range(3):
        one = Inputs(**{name: getattr(inputs, name)[row : row + 1] for name in Inputs.__slots__})
        assert torch.equal(step(one, states, READS[row : row + 1], WRITES[row : row + 1])[0], answers[row])
        assert torch.equal(states[WRITES[row]], written[row])


def test_a_nan_in_a_state_shows_in_its_sequence_alone() -> None:
    shape = (2, 4, 128, 64)
    inputs, states = inputs_of(shape), states_of(shape)
    clean = step_by(load(torch.float32))(inputs, states, READS, WRITES)
    states[3, 2, 50, 77] = math.nan
    spoiled = step_by(load(torch.float32))(inputs, states, READS, WRITES)
    assert spoiled[1, 2, 50].isnan()
    assert states[8, 2, 50].isnan().all()
    assert torch.equal(spoiled[[0, 2]], clean[[0, 2]])


def test_it_is_used_where_it_is_compiled_and_right(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert native_step() is not None

    def not_compiled(dtype: torch.dtype) -> None:
        raise OSError("kernels-avx512-float32.so: cannot open shared object file")

    monkeypatch.setattr(native_delta_rule, "load", not_compiled)
    native_step.cache_clear()
    try:
        assert native_step() is None
    finally:
        native_step.cache_clear()
    assert "delta nets are computed by torch, which copies their states: OSError: kernels-avx512" in caplog.text
