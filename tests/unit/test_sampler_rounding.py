"""Logits that were rounded otherwise give another token only where the two best nearly tie, or at a filter's border."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import msgspec
import pytest
import torch
from tests.support.odds import of_gumbel_draws, of_lookups
from torch import Tensor

from lockstep_runtime.protocol.step import SamplingParams
from lockstep_runtime.worker.filters import Filters
from lockstep_runtime.worker.gumbel import gumbel_noise, keys
from lockstep_runtime.worker.sampler import Draw, first_of_best, noisy, sample

VOCABULARY = 151_936  # Qwen's
ROWS = 16
DRAWS = 100_000
TEMPERATURES = (0.6, 1.0, 1.5)
ROUNDINGS = (1e-5, 1e-2)  # how far a logit moves at most: in float32, in bfloat16


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Of short operations: to share each costs more than to do it, the more so the busier the machine is."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def rows() -> Tensor:
    """Of different sharpness: from 50 tokens that stand out to one that leads."""
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(ROWS, VOCABULARY, generator=generator) * 2.5
    found[:, :50] += torch.rand(ROWS, 50, generator=generator) * torch.linspace(4, 30, ROWS)[:, None]
    return found


@pytest.fixture(scope="module")
def rounded(rows: Tensor) -> dict[float, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {far: rows + (torch.rand(rows.shape, generator=generator) * 2 - 1) * far for far in ROUNDINGS}


def test_a_draw_from_the_whole_vocabulary_changes_as_rarely_as_it_must(
    rows: Tensor, rounded: dict[float, Tensor]
) -> None:
    """100,000 draws, each from logits and from the same logits rounded in two ways; one noise serves all rows."""
    everything = torch.arange(VOCABULARY, dtype=torch.int32)[None]
    found, made = Counter[tuple[float, float]](), Counter[float]()
    races, of_rounded = Races(rows), {far: Races(others) for far, others in rounded.items()}
    for number in range(DRAWS // ROWS):
        temperature, seed = TEMPERATURES[number % 3], number // 2
        noise = gumbel_noise(keys([(seed, number)], rows.device), everything)[0]
        loud = torch.from_numpy((noise.numpy() > LOUD).nonzero()[0])
        drawn = races.won(noise, loud, temperature)
        made[temperature] += ROWS
        for far, other_races in of_rounded.items():
            won = other_races.won(noise, loud, temperature)
            found[temperature, far] += sum(one != other for one, other in zip(drawn, won, strict=True))
        if number % 100 == 0:
            params = SamplingParams(temperature=temperature, seed=seed)
            assert [one.token for one in sample(rows, [Draw(0, number, params)] * ROWS)] == drawn
    for temperature, draws in made.items():
        for far, others in rounded.items():
            pairs = list(zip(rows, others, strict=True))
            odds = sum(of_gumbel_draws(*pair, temperature) for pair in pairs) / ROWS
            assert odds < far / (2 * temperature)
            assert abs(found[temperature, far] - odds * draws) < 3 + 5 * (odds * draws) ** 0.5
            print(f"T {temperature}, {far}: {found[temperature, far]} of {draws}, odds {1000 * odds:.5f} in 1,000")


LOUD = 5.0  # as one of 150 tokens' noise is
LIKELY = 512  # tokens of each row


class Races:
    """Whose logit + temperature * noise is the largest of each row: a likely token's, or one's whose noise is loud."""

    def __init__(self, rows: Tensor) -> None:
        best = rows.topk(LIKELY + 1)
        self._rows, self._likely, self._logits = rows, best.indices[:, :LIKELY], best.values[:, :LIKELY]
        self._quiet = best.values[:, LIKELY].amax()  # no other token has a larger logit

    def won(self, noise: Tensor, loud: Tensor, temperature: float) -> list[int]:
        """noise: [vocabulary]; loud: the tokens whose noise is above `LOUD`."""
        of_likely = torch.add(self._logits, noise[self._likely], alpha=temperature).max(dim=1)
        of_loud = torch.add(self._rows[:, loud], noise[loud], alpha=temperature).max(dim=1)
        assert of_likely.values.maximum(of_loud.values).min() > self._quiet + LOUD * temperature
        likely = self._likely.gather(1, of_likely.indices[:, None])[:, 0]
        won = torch.where(of_likely.values > of_loud.values, likely, loud[of_loud.indices])
        tokens: list[int] = won.tolist()
        return tokens


def test_a_lookup_in_cumulated_probabilities_would_change_far_more(rows: Tensor, rounded: dict[float, Tensor]) -> None:
    for others in rounded.values():
        mine = sum(of_gumbel_draws(row, other, 1.0) for row, other in zip(rows, others, strict=True))
        theirs = sum(of_lookups(row, other, 1.0) for row, other in zip(rows, others, strict=True))
        assert theirs > 5 * mine


FILTERS = [
    SamplingParams(top_k=20),
    SamplingParams(top_k=20, top_p=0.95),
    SamplingParams(top_p=0.95),
    SamplingParams(min_p=0.05),
]
PER_ROW = 2 * DRAWS // len(FILTERS) // len(TEMPERATURES) // ROWS


@pytest.mark.parametrize("params", FILTERS, ids=str)
def test_a_filter_moves_its_own_border_and_nothing_else(
    params: SamplingParams, rows: Tensor, rounded: dict[float, Tensor]
) -> None:
    """A quarter of 100,000 draws for each, of the sharper rows, whose nucleus is small enough to draw from often."""
    for temperature in TEMPERATURES:
        warm = msgspec.structs.replace(params, temperature=temperature)
        draws = [Draw(0, number, msgspec.structs.replace(warm, seed=number // 3)) for number in range(PER_ROW)]
        made = len(draws) * ROWS // 2
        for far, others in rounded.items():
            at_border = near_ties = 0
            for row, other in zip(rows[ROWS // 2 :], others[ROWS // 2 :], strict=True):
                kept, tokens = drawn_from(row, warm, draws)
                kept_too, tokens_too = drawn_from(other, warm, draws)
                changed = tokens != tokens_too
                moved = ~torch.isin(tokens, kept_too) | ~torch.isin(tokens_too, kept)
                assert not (moved & ~changed).any()
                at_border += int(moved.sum())
                near_ties += int((changed & ~moved).sum())
            likely = far / (2 * temperature) * made
            assert near_ties < 3 + likely + 5 * likely**0.5
            assert at_border < 3 + far * made
            print(f"T {temperature}, {far}: {at_border} at the border, {near_ties} near ties, of {made}")


def drawn_from(row: Tensor, params: SamplingParams, draws: list[Draw]) -> tuple[Tensor, Tensor]:
    """The tokens that the filter leaves, and those that are drawn."""
    filters = Filters.of([params], row.device)
    values, tokens = row[None].sort(dim=1, descending=True)
    total = ((values - values[:, :1]) / params.temperature).double().exp().sum(dim=1, keepdim=True)
    border, _ = filters.border(values, total)
    left, kept = values[values >= border], tokens[values >= border]
    streams = keys([(draw.params.seed, draw.position) for draw in draws], row.device)
    everywhere = filters.rows(torch.zeros(len(draws), dtype=torch.int64))
    scores = noisy(left.expand(len(draws), -1), kept.expand(len(draws), -1), streams, everywhere)
    return kept, first_of_best(scores, kept.expand(len(draws), -1))
