"""Attention in C, compiled for this CPU: against float64, bit by bit against itself, and where it isn't compiled."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import Tensor

from lockstep_runtime.layers import attention_choice
from lockstep_runtime.layers.attention import SequenceAttention
from lockstep_runtime.layers.attention_choice import choose_attention
from lockstep_runtime.layers.cache import BLOCK_SIZE, LayerCache, PagedShape
from lockstep_runtime.layers.native.library import LEVELS, load
from lockstep_runtime.layers.native_attention import NativeAttention
from lockstep_runtime.layers.placement import Placement
from lockstep_runtime.protocol.step import SequenceSlice

CPU = torch.device("cpu")
HIGHEST = torch.backends.cpu.get_cpu_capability()
USABLE = [level for level in LEVELS if HIGHEST in LEVELS and list(LEVELS).index(level) >= list(LEVELS).index(HIGHEST)]
SHAPES = [(4, 128, 2), (2, 64, 7), (1, 256, 8), (3, 48, 1), (2, 16, 5)]  # kv heads, their width, what shares one
BLOCKS = 60
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}


def sequence(number: int, position: int, blocks: list[int], tokens: int = 1) -> SequenceSlice:
    return SequenceSlice(sequence_id=number, position=position, tokens=[0] * tokens, blocks=blocks)


BATCH = [
    sequence(0, 0, [7]),
    sequence(1, 40, [0, 2]),
    sequence(2, 95, [5, 3, 4], tokens=1),
    sequence(3, 1100, list(range(59, 24, -1))),
    sequence(4, 30, [9, 8], tokens=6),
    sequence(5, 31, [6]),
]


def numbers(shape: tuple[int, int, int], dtype: torch.dtype, tokens: int = 11) -> tuple[Tensor, LayerCache]:
    """Queries among what lies beside them, as layers give them, and a cache."""
    kv_heads, width, sharing = shape
    generator = torch.Generator().manual_seed(width)
    rows = torch.randn(tokens, kv_heads * (sharing + 2), width, generator=generator).to(dtype)
    keys, values = (torch.randn(BLOCKS * BLOCK_SIZE, kv_heads, width, generator=generator).to(dtype) for _ in range(2))
    return rows[:, : kv_heads * sharing], LayerCache(keys, values)


def exact(queries: Tensor, cache: LayerCache, batch: list[SequenceSlice]) -> Tensor:
    """In float64, by the definition."""
    kv_heads, width = cache.keys.shape[1:]
    rows: list[Tensor] = []
    for one in batch:
        for position in range(one.position, one.position + len(one.tokens)):
            slots = [one.blocks[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE for at in range(position + 1)]
            keys, values = cache.keys[slots].double(), cache.values[slots].double()
            grouped = queries[len(rows)].double().view(kv_heads, -1, width)
            weights = (torch.einsum("kgd,tkd->kgt", grouped, keys) / math.sqrt(width)).softmax(-1)
            rows.append(torch.einsum("kgt,tkd->kgd", weights, values).reshape(-1))
    return torch.stack(rows)


def native(dtype: torch.dtype, level: str | None = None) -> NativeAttention:
    return NativeAttention(dtype, SequenceAttention(), level)


@pytest.mark.parametrize("level", USABLE)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_agrees_with_attention_in_float64(shape: tuple[int, int, int], dtype: torch.dtype, level: str) -> None:
    queries, cache = numbers(shape, dtype)
    found = native(dtype, level).plan(BATCH, CPU)(queries, cache)
    expected = exact(queries, cache, BATCH)
    assert found.dtype == dtype
    assert torch.allclose(found.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_scores_far_apart_and_all_alike_are_weighed_right(dtype: torch.dtype) -> None:
    shape = (1, 64, 2)
    queries, cache = numbers(shape, dtype, tokens=1)
    batch = [sequence(0, 200, list(range(7)))]
    for factor in (0.0, 30.0):
        scaled = (queries * factor).to(dtype)
        found = native(dtype).plan(batch, CPU)(scaled, cache)
        tolerance = 10 * TOLERANCE[dtype]
        assert torch.allclose(found.double(), exact(scaled, cache, batch), rtol=tolerance, atol=tolerance)


def test_a_token_gets_the_same_bits_in_any_batch_and_with_any_number_of_threads() -> None:
    queries, cache = numbers((4, 128, 2), torch.bfloat16)
    attention = native(torch.bfloat16)
    together = attention.plan(BATCH, CPU)(queries, cache)
    row = 0
    for one in BATCH:
        rows = slice(row, row + len(one.tokens))
        assert torch.equal(attention.plan([one], CPU)(queries[rows], cache), together[rows])
        row = rows.stop
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(attention.plan(BATCH[:4], CPU)(queries[:4], cache), together[:4])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_a_token_does_not_see_is_not_read_and_a_nan_that_it_sees_shows(dtype: torch.dtype, bad: float) -> None:
    queries, cache = numbers((2, 64, 2), dtype, tokens=2)
    batch = [sequence(0, 40, [0, 2]), sequence(1, 40, [1, 3])]
    clean = native(dtype).plan(batch, CPU)(queries, cache)
    seen = [*range(32), *range(64, 73), *range(32, 64), *range(96, 105)]
    unseen = [slot for slot in range(BLOCKS * BLOCK_SIZE) if slot not in seen]
    cache.keys[unseen], cache.values[unseen] = math.nan, math.nan
    assert torch.equal(native(dtype).plan(batch, CPU)(queries, cache), clean)
    for part in (cache.keys, cache.values):
        kept = part[70].clone()
        part[70] = bad
        spoiled = native(dtype).plan(batch, CPU)(queries, cache)
        assert not torch.isfinite(spoiled[0].float()).all()
        assert torch.equal(spoiled[1], clean[1])
        part[70] = kept


def test_queries_of_any_strides_are_taken() -> None:
    queries, cache = numbers((2, 64, 2), torch.float32, tokens=2)
    batch = [sequence(0, 40, [0, 2]), sequence(1, 40, [1, 3])]
    turned = queries.transpose(1, 2).contiguous().transpose(1, 2)
    attend = native(torch.float32).plan(batch, CPU)
    assert torch.equal(attend(turned, cache), attend(queries, cache))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_it_is_chosen_on_a_cpu(dtype: torch.dtype) -> None:
    chosen = choose_attention(
        Placement(device=CPU, dtype=dtype, activation=dtype), PagedShape(kv_heads=4, head_dim=128, sharing=2)
    )
    assert isinstance(chosen, NativeAttention)


def test_where_it_is_not_compiled_attention_goes_sequence_by_sequence_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    half = Placement(device=CPU, dtype=torch.float16, activation=torch.float16)
    shape = PagedShape(kv_heads=2, head_dim=16, sharing=2)
    with caplog.at_level(logging.WARNING):
        assert isinstance(choose_attention(half, shape), SequenceAttention)
    assert "there are no kernels in C for torch.float16" in caplog.text
    with pytest.raises(OSError, match="on a CPU with DEFAULT"):
        load(torch.float32, "DEFAULT")
    monkeypatch.setattr(attention_choice, "differs", lambda *_: "its result differs")
    exact_placement = Placement(device=CPU, dtype=torch.float32, activation=torch.float32)
    assert isinstance(choose_attention(exact_placement, shape), SequenceAttention)
