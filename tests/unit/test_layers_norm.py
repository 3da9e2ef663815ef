"""RMSNorm on a CPU, in C and by torch, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lockstep_runtime.layers.native.library import load
from lockstep_runtime.layers.native_norm import is_laid_out, native_norm, normalize_by
from lockstep_runtime.layers.norm import rms_normalize

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-9}


def numbers(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def exact(x: Tensor, epsilon: float, weight: Tensor) -> Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [1, 48, 128, 1024])
def test_rows_and_heads_agree_with_float64(width: int, dtype: torch.dtype) -> None:
    rows = numbers(7, width, dtype=dtype) * 3
    heads = numbers(7, 6, width, dtype=dtype)[:, 1:5]  # among others, as layers have them
    weights = numbers(4, width, dtype=dtype)
    for x, weight in (
        (rows, weights[0]),
        (heads, weights),
        (heads, weights[0]),
        (heads.transpose(0, 1), weights[0]),
        (heads[0, 0], weights[0]),
    ):
        found = rms_normalize(x, 1e-6, weight)
        assert found.dtype == dtype
        assert found.shape == x.shape
        assert torch.allclose(found.double(), exact(x, 1e-6, weight), rtol=2 * TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("level", ["AVX2", torch.backends.cpu.get_cpu_capability()])
def test_the_kernel_of_each_level_does_so_with_one_and_with_several_threads(level: str) -> None:
    x, weight = numbers(96, 1024, dtype=torch.bfloat16), numbers(1024, dtype=torch.bfloat16)
    normalize, threads = normalize_by(load(torch.bfloat16, level)), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = normalize(x, 1e-6, weight)
        torch.set_num_threads(3)
        assert torch.equal(normalize(x, 1e-6, weight), alone)
    finally:
        torch.set_num_threads(threads)
    assert torch.allclose(alone.double(), exact(x, 1e-6, weight), rtol=2**-7, atol=2**-8)


def test_a_row_has_the_same_bits_in_any_batch_and_a_nan_stays_in_its_row() -> None:
    x, weight = numbers(9, 128, dtype=torch.bfloat16), numbers(128, dtype=torch.bfloat16)
    together = rms_normalize(x, 1e-6, weight)
    assert all(torch.equal(rms_normalize(x[row : row + 1], 1e-6, weight)[0], together[row]) for row in range(9))
    x[4, 77] = math.nan
    spoiled = rms_normalize(x, 1e-6, weight)
    assert spoiled[4].isnan().all()
    assert torch.equal(spoiled[:4], together[:4])
    assert torch.equal(spoiled[5:], together[5:])


def test_it_is_used_where_it_is_compiled_and_rows_lie_side_by_side() -> None:
    assert native_norm(torch.float32) is not None
    assert native_norm(torch.bfloat16) is not None
    assert native_norm(torch.float16) is None
    heads, weight = numbers(3, 4, 8, dtype=torch.float32), numbers(4, 8, dtype=torch.float32)
    assert is_laid_out(heads, weight)
    assert is_laid_out(heads[:, :2], weight[:2])
    assert not is_laid_out(heads.transpose(1, 2), weight)
    assert not is_laid_out(heads, weight[:, :4])
    assert not is_laid_out(heads[..., ::2], weight[0, :4])
    assert not is_laid_out(heads[0, 0], weight[0])
