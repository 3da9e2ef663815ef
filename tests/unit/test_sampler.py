from __future__ import annotations

import itertools
import math
from collections import Counter

import msgspec
import pytest
import torch

from lockstep_runtime.protocol.step import SamplingParams
from lockstep_runtime.worker.gumbel import gumbel_noise, keys
from lockstep_runtime.worker.likeliest import NonFiniteError
from lockstep_runtime.worker.sampler import Draw, sample, take_best

LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.0, 0.0])


def draws(count: int, params: SamplingParams, logits: torch.Tensor = LOGITS) -> Counter[int]:
    """How often each token is drawn at so many positions."""
    rows = logits.expand(count, -1)
    return Counter(t.token for t in sample(rows, [Draw(0, position, params) for position in range(count)]))


DRAWS = 50_000
CRITICAL = 4.5  # standard deviations of chi-squared: once in 300,000 tests of a right distribution


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        (SamplingParams(temperature=0.6, seed=1), 300),
        (SamplingParams(temperature=1.0, seed=2), 300),
        (SamplingParams(temperature=1.5, seed=2**64 - 1), 300),
        (SamplingParams(temperature=1.0, seed=4, top_k=20), 20),
        (SamplingParams(temperature=0.6, seed=5, top_k=20, top_p=0.95), None),
        (SamplingParams(temperature=1.0, seed=6, top_p=0.9), None),
        (SamplingParams(temperature=1.5, seed=7, min_p=0.1), None),
    ],
    ids=str,
)
def test_frequencies_follow_the_softmax(params: SamplingParams, allowed: int | None) -> None:
    """Chi-squared against what the filters leave, by rules of their own; rare tokens are counted as one."""
    logits = torch.randn(300, generator=torch.Generator().manual_seed(7)) * 2
    expected = filtered_softmax(logits, params) * DRAWS
    assert allowed is None or int((expected > 0).sum()) == allowed
    found = draws(DRAWS, params, logits)
    assert sum(count for token, count in found.items() if expected[token] == 0) == 0
    counts = torch.tensor([found[token] for token in range(len(logits))], dtype=torch.float64)
    rare = expected < 10
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None] + 1e-9])
    freedom = len(counts) - 1
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_squared - freedom) < CRITICAL * (2 * freedom) ** 0.5


def filtered_softmax(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Token by token, from the likeliest on."""
    shares = (logits.double() / params.temperature).softmax(0)
    order = shares.argsort(descending=True)[: params.top_k or None].tolist()
    total = float(shares[order].sum())
    kept, reached = [], 0.0
    for token in order:
        if reached / total < params.top_p and float(shares[token]) >= params.min_p * float(shares[order[0]]):
            kept.append(token)
        reached += float(shares[token])
    left = torch.zeros_like(shares)
    left[kept] = shares[kept] / shares[kept].sum()
    return left


def test_a_draw_depends_on_seed_and_position_and_not_on_company() -> None:
    params = SamplingParams(seed=11)
    alone = [sample(LOGITS[None], [Draw(1, position, params)])[0].token for position in range(50)]
    rows = torch.cat((LOGITS.expand(50, -1), torch.randn(9, 5)))
    together = sample(
        rows, [*(Draw(1, n, params) for n in range(50)), *(Draw(2, 3, SamplingParams()) for _ in range(9))]
    )
    assert [token.token for token in together[:50]] == alone
    assert alone != [sample(LOGITS[None], [Draw(1, n, SamplingParams(seed=12))])[0].token for n in range(50)]


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        (SamplingParams(temperature=0), {1}),
        (SamplingParams(top_k=1), {1}),
        (SamplingParams(temperature=1e-9), {1}),
        (SamplingParams(top_k=2), {1, 3}),
        (SamplingParams(top_k=99), {0, 1, 2, 3, 4}),
        (SamplingParams(top_p=1e-9), {1}),
        (SamplingParams(top_p=0.60), {1, 3}),  # probabilities: .13 .57 .03 .21 .08 (rounded)
        (SamplingParams(top_p=0.80), {0, 1, 3}),
        (SamplingParams(min_p=0.3), {1, 3}),
        (SamplingParams(min_p=1.0), {1}),
        (SamplingParams(top_k=3, top_p=0.80), {1, 3}),  # top_p of what top_k leaves: .57 and .21 of .91 are enough
    ],
)
def test_filters(params: SamplingParams, allowed: set[int]) -> None:
    assert set(draws(3000, params)) == allowed


def test_what_ties_at_the_border_stays_in() -> None:
    tied = torch.tensor([1.0, 3.0, 1.0, 2.0, 1.0, 0.0])
    assert set(draws(2000, SamplingParams(top_k=3), tied)) == {0, 1, 2, 3, 4}
    assert set(draws(2000, SamplingParams(top_p=0.85), tied)) == {0, 1, 2, 3, 4}


def test_a_row_is_drawn_alike_whatever_else_is_in_the_batch() -> None:
    """Of every kind, in a batch that is worked on piece by piece."""
    kinds = [
        SamplingParams(),
        SamplingParams(top_k=3),
        SamplingParams(top_k=30, top_p=0.9),
        SamplingParams(top_p=0.8),
        SamplingParams(min_p=0.1),
        SamplingParams(temperature=0),
    ]
    logits = torch.randn(60, 5000, generator=torch.Generator().manual_seed(1)) * 3
    company = [
        Draw(row, row * 3, msgspec.structs.replace(kinds[row % 6], seed=row, logprobs=row % 3 - 1)) for row in range(60)
    ]
    together = sample(logits, company)
    for row, draw in enumerate(company):
        (alone,) = sample(logits[row : row + 1], [draw])
        assert alone == together[row]


@pytest.mark.parametrize("rounded", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spread", [0.05, 3.0, 12.0])
def test_draws_are_those_of_a_plain_search_over_each_row(rounded: torch.dtype, spread: float) -> None:
    """Of every mixture of filters, over sharp and flat rows; in bfloat16 many logits tie."""
    generator = torch.Generator().manual_seed(11)
    logits = (torch.randn(120, 9001, generator=generator) * spread).to(rounded).float()
    company = [
        Draw(row, 7 + row, SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m, seed=row))
        for row, (t, k, p, m) in enumerate(itertools.product((0, 0.6, 1.5), (0, 1, 20, 300, 8000), (1, 0.8), (0, 0.2)))
    ]
    together = [one.token for one in sample(logits[: len(company)], company)]
    assert together == [plain_search(logits[row], draw) for row, draw in enumerate(company)]
    backwards = sample(logits[: len(company)].flip(0), company[::-1])
    assert [one.token for one in backwards[::-1]] == together


def plain_search(logits: torch.Tensor, draw: Draw) -> int:
    """All tokens in one line: what ties with the last that a filter leaves stays in."""
    params = draw.params
    if params.temperature == 0:
        return int(logits.argmax())
    border = float(logits.sort(descending=True).values[min(params.top_k or 10**9, len(logits)) - 1])
    weights = ((logits.double() - float(logits.max())) / params.temperature).exp()
    weights = weights.where(logits >= border, 0.0)
    if params.top_p < 1:
        ordered = weights.sort(descending=True, stable=True)
        enough = int((ordered.values.cumsum(0) < params.top_p * float(weights.sum())).sum())
        border = max(border, float(logits[ordered.indices[enough]]))
    if params.min_p:
        border = max(border, float(logits.max()) + math.log(params.min_p) * params.temperature)
    noise = gumbel_noise(keys([(params.seed, draw.position)], logits.device), torch.arange(len(logits))[None])[0]
    return int((logits.where(logits >= border, -math.inf) + params.temperature * noise).argmax())


def test_top_p_over_a_flat_vocabulary_sorts_it_all() -> None:
    flat = torch.linspace(0.001, 0, 5000)
    counts = draws(300, SamplingParams(top_p=0.5), flat)
    assert max(counts) <= 2500
    assert max(counts) > 1100  # beyond the first guess


def test_log_probabilities_are_of_the_unmodified_distribution() -> None:
    (token,) = sample(LOGITS[None], [Draw(4, 0, SamplingParams(temperature=0, top_k=1, logprobs=2))])
    expected = LOGITS.log_softmax(0)
    assert token.logprob == pytest.approx(float(expected[1]))
    assert [best for best, _ in token.top] == [1, 3]
    assert [logprob for _, logprob in token.top] == pytest.approx([float(expected[1]), float(expected[3])])
    (bare,) = sample(LOGITS[None], [Draw(4, 0, SamplingParams(logprobs=0))])
    assert bare.logprob is not None
    assert bare.top == []


def test_the_drawn_token_is_among_the_likeliest_that_are_asked_for() -> None:
    params = [SamplingParams(temperature=3, seed=seed, logprobs=seed % 4) for seed in range(200)]
    expected = LOGITS.log_softmax(0)
    likeliest = [1, 3, 0, 4]
    outside = 0
    for token, asked in zip(sample(LOGITS.expand(200, -1), [Draw(0, 0, one) for one in params]), params, strict=True):
        assert token.logprob == pytest.approx(float(expected[token.token]))
        among = likeliest[: asked.logprobs]
        outside += asked.logprobs > 0 and token.token not in among
        extra = [token.token] if asked.logprobs and token.token not in among else []
        assert [other for other, _ in token.top] == among + extra
        assert all(logprob == pytest.approx(float(expected[other])) for other, logprob in token.top)
    assert outside > 20


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_garbage_is_refused(bad: float) -> None:
    logits = LOGITS.expand(3, -1).clone()
    logits[1, 2] = bad
    with pytest.raises(NonFiniteError, match="1 of 3 sequences"):
        sample(logits, [Draw(n, 0, SamplingParams()) for n in range(3)])
    with pytest.raises(NonFiniteError):
        take_best(torch.zeros(1), torch.tensor([bad]), [Draw(0, 0, SamplingParams(temperature=0))])


def test_large_finite_logits_are_not_garbage() -> None:
    huge = torch.full((2, 4), 3e38)
    assert len(sample(huge, [Draw(0, 0, SamplingParams(temperature=0))] * 2)) == 2
