"""What rules change in logits, beside transformers' processors and formulas written token by token."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Set

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from lockstep_runtime.protocol.step import LogitRules, Past, Ruled, SamplingParams, SequenceSlice
from lockstep_runtime.worker.rulebook import Rulebook
from lockstep_runtime.worker.ruled_draws import draw_by_rules
from lockstep_runtime.worker.rules import RuledRow, Seen, adjust
from lockstep_runtime.worker.sampler import Draw, sample

VOCABULARY = 300
PROMPT, ANSWER = [5, 5, 9, 200, 17], [9, 9, 4, 299, 9]
GREEDY = SamplingParams(temperature=0)


def seen(prompt: list[int], answer: list[int]) -> Seen:
    found = Seen()
    found.add(prompt, drawn=False)
    for token in answer:
        found.add([token], drawn=True)
    return found


def adjusted(logits: torch.Tensor, rules: LogitRules, prompt: list[int], answer: list[int]) -> torch.Tensor:
    copy = logits.clone()[None]
    adjust(copy, [RuledRow(row=0, rules=rules, drawn=len(answer), seen=seen(prompt, answer))])
    return copy[0]


def plainly(logits: torch.Tensor, rules: LogitRules, prompt: list[int], answer: list[int]) -> list[float]:
    """vLLM's formulas, token by token."""
    counts, found = Counter(answer), []
    for token, logit in enumerate(logits.tolist()):
        value = logit + rules.bias.get(token, 0.0)
        if len(answer) < rules.min_tokens and token in rules.end_ids:
            value = -math.inf
        if token in prompt or token in answer:
            value = value / rules.repetition_penalty if value > 0 else value * rules.repetition_penalty
        value -= rules.frequency_penalty * counts[token]
        value -= rules.presence_penalty * (counts[token] > 0)
        found.append(value)
    return found


tokens = st.lists(st.integers(0, VOCABULARY - 1), max_size=40)


@settings(max_examples=60, deadline=None)
@given(
    prompt=tokens,
    answer=tokens,
    repetition=st.sampled_from([1.0, 0.5, 1.3]),
    frequency=st.sampled_from([0.0, -2.0, 0.7]),
    presence=st.sampled_from([0.0, 2.0, -0.4]),
    bias=st.dictionaries(st.integers(0, VOCABULARY - 1), st.sampled_from([-100.0, 3.5, 100.0]), max_size=5),
    least=st.integers(0, 50),
)
def test_they_are_vllms_formulas(
    prompt: list[int],
    answer: list[int],
    repetition: float,
    frequency: float,
    presence: float,
    bias: dict[int, float],
    least: int,
) -> None:
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(3)) * 5
    rules = LogitRules(
        repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence, bias=bias,
        min_tokens=least, end_ids=[7, 9],
    )  # fmt: skip
    found = adjusted(logits, rules, prompt, answer)
    assert found.tolist() == pytest.approx(plainly(logits, rules, prompt, answer), abs=1e-4)


def test_they_are_what_transformers_processors_do() -> None:
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(4)) * 5
    ids = torch.tensor([PROMPT + ANSWER])
    expected = RepetitionPenaltyLogitsProcessor(1.4)(ids, logits.clone()[None])[0]
    assert torch.allclose(adjusted(logits, LogitRules(repetition_penalty=1.4), PROMPT, ANSWER), expected)
    expected = SequenceBiasLogitsProcessor([[[3], -7.0], [[299], 2.5]])(ids, logits.clone()[None])[0]
    assert torch.allclose(adjusted(logits, LogitRules(bias={3: -7.0, 299: 2.5}), PROMPT, ANSWER), expected)
    ends = MinNewTokensLengthLogitsProcessor(len(PROMPT), 6, [7, 9], device="cpu")
    rules = LogitRules(min_tokens=6, end_ids=[7, 9])
    assert torch.equal(adjusted(logits, rules, PROMPT, ANSWER), ends(ids, logits.clone()[None])[0])
    longer = torch.tensor([[*PROMPT, *ANSWER, 1]])
    assert torch.equal(adjusted(logits, rules, PROMPT, [*ANSWER, 1]), ends(longer, logits.clone()[None])[0])


@pytest.mark.parametrize("size", [1, 3, 64, 65, 1000])
def test_tokens_are_counted_however_they_come(size: int) -> None:
    drawn = torch.randint(0, 150, (size,), generator=torch.Generator().manual_seed(size)).tolist()
    at_once = Seen()
    at_once.add(PROMPT, drawn=False)
    at_once.add(drawn, drawn=True)
    one_by_one = seen(PROMPT, drawn)
    for found in (at_once, one_by_one):
        counts = dict(zip(found.tokens.tolist(), found.counts.tolist(), strict=True))
        assert counts == dict.fromkeys(PROMPT, 0.0) | dict(Counter(drawn))


RULES = [
    LogitRules(repetition_penalty=1.5),
    LogitRules(frequency_penalty=1.5),
    LogitRules(presence_penalty=2.0, frequency_penalty=0.5, bias={11: 4.0}),
    LogitRules(min_tokens=30, end_ids=list(range(0, VOCABULARY, 2))),
]


def decode(rulebook: Rulebook, rules: LogitRules, *, forget: Set[int] = frozenset(), length: int = 40) -> list[int]:
    """A sequence step by step: its logits depend on its last token. Where rank 0 has forgotten, it is told again."""
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(9)) * 2
    sequence, told = list(PROMPT), False
    while len(sequence) < len(PROMPT) + length:
        answered = len(sequence) - len(PROMPT)
        if answered in forget:
            rulebook, told, forget = Rulebook(4), True, forget - {answered}  # a new process; the engine knows nothing
        fed = len(PROMPT) if answered == 0 else 1
        start = 0 if rules.needs_prompt else len(PROMPT)
        first = len(sequence) - fed
        past = None if told else Past(rules=rules, start=start, tokens=sequence[start:first])
        slice_ = SequenceSlice(
            sequence_id=1, position=first, tokens=sequence[first:], blocks=[0], sample=GREEDY,
            ruled=Ruled(drawn=answered, past=past),
        )  # fmt: skip
        for _ in range(2):  # a step that is repeated gives the same
            drawn = draw_by_rules(table[sequence[-1:]].clone(), [slice_], rulebook)
        told = not drawn.put_off
        assert drawn.put_off == ([] if told else [1])
        sequence += [token.token for token in drawn.sampled]
    return sequence[len(PROMPT) :]


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_a_new_process_is_told_the_past_and_draws_the_same(rules: LogitRules) -> None:
    undisturbed = decode(Rulebook(4), rules)
    assert undisturbed != decode(Rulebook(4), LogitRules())
    assert decode(Rulebook(4), rules, forget={0, 1, 7, 8, 39}) == undisturbed


def test_what_makes_way_is_asked_for_again() -> None:
    rulebook, rules = Rulebook(2), LogitRules(presence_penalty=1.0)
    begun = [
        SequenceSlice(
            sequence_id=id, position=0, tokens=[4, 5], blocks=[0], sample=GREEDY,
            ruled=Ruled(drawn=0, past=Past(rules=rules, start=2, tokens=[])),
        )
        for id in (1, 2, 3)
    ]  # fmt: skip
    assert draw_by_rules(torch.zeros(3, VOCABULARY), begun, rulebook).put_off == []
    next_ones = [
        SequenceSlice(sequence_id=id, position=2, tokens=[0], blocks=[0], sample=GREEDY, ruled=Ruled(drawn=1))
        for id in (1, 2, 3)
    ]
    drawn = draw_by_rules(torch.zeros(3, VOCABULARY), next_ones, rulebook)
    assert (drawn.put_off, [token.sequence_id for token in drawn.sampled]) == ([1], [2, 3])
    assert [token.token for token in drawn.sampled] == [1, 1]  # 0 was drawn, and is less likely now


def test_log_probabilities_are_those_of_before_the_rules() -> None:
    """In any company, and whoever asks for them."""
    logits = torch.randn(6, VOCABULARY, generator=torch.Generator().manual_seed(5)) * 3
    params = [SamplingParams(seed=row, logprobs=row % 3, top_k=50 * (row % 2)) for row in range(6)]
    draws = [Draw(row, 3, one) for row, one in enumerate(params)]
    best = int(logits[4].argmax())
    ruled = [
        RuledRow(row=4, rules=LogitRules(bias={best: -100.0}), drawn=0, seen=Seen()),
        RuledRow(row=1, rules=LogitRules(repetition_penalty=3.0), drawn=2, seen=seen(PROMPT, ANSWER)),
    ]
    together = sample(logits.clone(), draws, ruled)
    expected = logits.log_softmax(dim=1)
    for row, token in enumerate(together):
        assert token.logprob == pytest.approx(float(expected[row, token.token]), abs=1e-5)
    assert together[4].token != best
    assert together[4].top[0][0] == best
    for row in (0, 2, 3, 5):
        assert together[row] == sample(logits[row : row + 1], [draws[row]])[0]
    for one in ruled:
        alone = RuledRow(row=0, rules=one.rules, drawn=one.drawn, seen=one.seen)
        assert sample(logits[one.row : one.row + 1].clone(), [draws[one.row]], [alone])[0] == together[one.row]
