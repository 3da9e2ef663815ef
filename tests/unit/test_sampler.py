from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from lockstep_runtime.wire import SamplingParams
from lockstep_runtime.worker.sampler import Draw, NonFiniteError, sample, take_best, uniform

LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.0, 0.0])


def draws(count: int, params: SamplingParams, logits: torch.Tensor = LOGITS) -> Counter[int]:
    """How often each token is drawn at so many positions."""
    rows = logits.expand(count, -1)
    return Counter(t.token for t in sample(rows, [Draw(0, position, params) for position in range(count)]))


def test_uniform_is_uniform_and_streams_differ() -> None:
    for seed in (0, 1, 2**64 - 1):
        numbers = [uniform(seed, position) for position in range(4000)]
        assert all(0 <= number < 1 for number in numbers)
        assert abs(sum(numbers) / 4000 - 0.5) < 0.02
        assert max(Counter(int(number * 10) for number in numbers).values()) < 480
    assert len({uniform(seed, 7) for seed in range(1000)}) == 1000
    correlation = sum((uniform(5, n) - 0.5) * (uniform(6, n) - 0.5) for n in range(4000)) / 4000 * 12
    assert abs(correlation) < 0.06


def test_frequencies_follow_the_softmax() -> None:
    counts = draws(6000, SamplingParams(temperature=0.8, seed=3))
    for token, probability in enumerate((LOGITS / 0.8).softmax(0).tolist()):
        assert counts[token] / 6000 == pytest.approx(probability, abs=0.025)


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
