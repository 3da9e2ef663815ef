"""The likeliest tokens by blocks, beside torch's own search over whole rows."""

from __future__ import annotations

import math

import pytest
import torch

from lockstep_runtime.worker.likeliest import BLOCK, CACHED, NonFiniteError, look_at, total_weight

SIZES = [1, 7, BLOCK - 1, BLOCK, 40 * BLOCK, 40 * BLOCK + 1, 151_936, 50_257]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 8, 60])
def test_they_are_those_of_a_search_over_whole_rows(size: int, count: int) -> None:
    logits = torch.randn(9, size, generator=torch.Generator().manual_seed(size + count)) * 3
    logits[:, size // 2 :] -= 2  # likely ones side by side, as in vocabularies by frequency
    of = torch.tensor([8, 0, 3, 3])
    values, tokens = look_at(logits).likeliest(of, count)
    assert torch.equal(values, logits[of].topk(min(count, size)).values)
    assert torch.equal(logits[of].gather(1, tokens), values)
    assert all(len(set(row)) == min(count, size) for row in tokens.tolist())


@pytest.mark.parametrize("levels", [1, 3, 50])
def test_equal_numbers_are_found_once_each(levels: int) -> None:
    logits = torch.randint(levels, (5, 33 * BLOCK + 5), generator=torch.Generator().manual_seed(levels)).float()
    values, tokens = look_at(logits).likeliest(torch.arange(5), 7)
    assert torch.equal(values, logits.topk(7).values)
    assert all(len(set(row)) == 7 for row in tokens.tolist())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, BLOCK, 41 * BLOCK - 1, 41 * BLOCK + 2])
def test_garbage_is_refused_wherever_it_stands(bad: float, place: int) -> None:
    logits = torch.zeros(2 * CACHED // (41 * BLOCK) + 3, 41 * BLOCK + 3)
    look_at(logits)
    logits[-2, place] = bad
    with pytest.raises(NonFiniteError, match=f"1 of {len(logits)} sequences"):
        look_at(logits)


def test_the_sum_of_weights_is_the_same_in_any_company() -> None:
    logits = torch.randn(5, 1000 * BLOCK + 77, generator=torch.Generator().manual_seed(4)) * 3
    best, temperature = logits.amax(dim=1, keepdim=True), torch.tensor([[0.6], [1.0], [1.5], [0.1], [2.0]])
    together = total_weight(logits, best, temperature)
    expected = ((logits - best).double() / temperature.double()).exp().sum(dim=1, keepdim=True)
    assert together.tolist() == [pytest.approx(row) for row in expected.tolist()]
    for row in range(5):
        some = slice(row, row + 1)
        assert torch.equal(total_weight(logits[some], best[some], temperature[some]), together[some])
