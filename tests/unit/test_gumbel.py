"""The noise of draws: a hash that whole numbers check, and a distribution."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lockstep_runtime.worker.gumbel import FACTORS, GOLDEN_32, gumbel_noise, keys

CPU = torch.device("cpu")
MEAN, VARIANCE = 0.5772156649, math.pi**2 / 6  # of the standard Gumbel distribution


def noise_of(streams: list[tuple[int, int]], vocabulary: int) -> Tensor:
    return gumbel_noise(keys(streams, CPU), torch.arange(vocabulary)[None])


def reference(key: tuple[int, int], token: int) -> float:
    """The same in Python's whole numbers and doubles."""

    def fold(state: int, bits: int) -> int:
        return state ^ (state >> bits)

    state = (token * GOLDEN_32 + key[0]) % 2**32
    state = fold(state, 16) * FACTORS[0] % 2**32
    state = (fold(state, 15) ^ key[1]) * FACTORS[1] % 2**32
    number = (fold(state, 15) % 2**31 + 0.5) * 2.0**-31
    return -math.log(-math.log1p(-number))


def test_noise_is_the_hash_that_it_says() -> None:
    streams = [(0, 0), (1, 7), (2**64 - 1, 31), (12345678901234567890, 2**20)]
    tokens = [0, 1, 2, 1000, 65_535, 151_935, 2**31 - 1]
    found = gumbel_noise(keys(streams, CPU), torch.tensor([tokens]))
    for row, key in enumerate(keys(streams, CPU).tolist()):
        expected = [reference((key[0] % 2**32, key[1] % 2**32), token) for token in tokens]
        assert found[row].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_noise_of_one_draw_is_the_same_in_any_company() -> None:
    everything = noise_of([(seed, position) for seed in range(4) for position in range(4)], 3000)
    for row, (seed, position) in enumerate((seed, position) for seed in range(4) for position in range(4)):
        assert torch.equal(everything[row], noise_of([(seed, position)], 3000)[0])
    some = torch.tensor([[7, 2999, 0]])
    assert torch.equal(gumbel_noise(keys([(2, 3)], CPU), some)[0], everything[11][some[0]])


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_noise_is_gumbels(seed: int) -> None:
    noise = noise_of([(seed, position) for position in range(16)], 50_000).double()
    assert float(noise.mean()) == pytest.approx(MEAN, abs=0.01)
    assert float(noise.var()) == pytest.approx(VARIANCE, abs=0.02)
    for quantile in (0.001, 0.1, 0.5, 0.9, 0.999, 0.9999):
        value = -math.log(-math.log(quantile))
        share, spread = float((noise < value).double().mean()), (quantile * (1 - quantile) / noise.numel()) ** 0.5
        assert abs(share - quantile) < 5 * spread


def test_the_ends_are_finite() -> None:
    found = torch.cat([noise_of([(seed, 0)], 1_000_000) for seed in range(20)])
    assert bool(found.isfinite().all())
    assert -2.8 < float(found.min()) < -2.4
    assert 14 < float(found.max()) < 22.2


@pytest.mark.parametrize("shift", [(1, 0), (0, 1), (2**32, 0), (1, 1), (0, 1024)], ids=str)
def test_neighbouring_seeds_and_positions_have_nothing_in_common(shift: tuple[int, int]) -> None:
    """Nor do neighbouring tokens of two streams."""
    streams = [(seed, position) for seed in (0, 5) for position in range(8)]
    first = (noise_of(streams, 20_000).double() - MEAN) / VARIANCE**0.5
    shifted = [(seed + shift[0], position + shift[1]) for seed, position in streams]
    other = (noise_of(shifted, 20_000).double() - MEAN) / VARIANCE**0.5
    for step in (0, 1, 2, 64):
        pairs = (first[:, : 20_000 - step] * other[:, step:]).flatten()
        assert abs(float(pairs.mean())) < 5 / len(pairs) ** 0.5
        if step:
            alone = (first[:, : 20_000 - step] * first[:, step:]).flatten()
            assert abs(float(alone.mean())) < 5 / len(alone) ** 0.5
