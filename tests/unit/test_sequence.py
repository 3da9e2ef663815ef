"""What is fed, scored, ruled and shown of one sequence, token by token."""

from __future__ import annotations

import pytest
from tests.unit.test_image_book import prompt_image

from lockstep_runtime.engine.client import FinishReason, GenerationRequest
from lockstep_runtime.engine.sequence import Sequence
from lockstep_runtime.protocol.step import Grammar, LogitRules, Past, Ruled, SampledToken, SamplingParams, Scoring

PROMPT = (10, 11, 12, 13, 14)
GRAMMAR = LogitRules(grammar=Grammar(kind="regex", text="a", end_ids=(1,)))
BIAS = LogitRules(bias={3: 1.0})
PENALTY = LogitRules(repetition_penalty=1.5)


def sequence(
    prompt: tuple[int, ...] = PROMPT, *, scores: int = -1, rules: LogitRules | None = None, max_tokens: int = 3
) -> Sequence:
    sampling = SamplingParams(temperature=0, prompt_logprobs=scores)
    request = GenerationRequest(
        request_id="1",
        prompt=prompt,
        max_tokens=max_tokens,
        sampling=sampling,
        stop_token_ids=frozenset({99}),
        rules=rules,
    )
    return Sequence(1, request)


def token(number: int) -> SampledToken:
    return SampledToken(sequence_id=1, token=number)


def test_it_begins_with_its_prompt_and_nothing_done() -> None:
    one = sequence()
    assert (one.tokens, one.computed, one.fault_points, one.drawn, one.remaining) == ([*PROMPT], 0, 0, 0, 5)
    assert one.most_tokens == 8


# --- the end


def test_it_ends_with_its_last_token_a_stop_token_or_the_models_length() -> None:
    one = sequence(max_tokens=2)
    one.fault_points = 1
    assert one.append(token(7), 100) is None
    assert (one.fault_points, one.drawn) == (0, 1)
    assert one.append(token(7), 100) is FinishReason.LENGTH
    assert sequence().append(token(99), 100) is FinishReason.STOP
    assert sequence().append(token(7), len(PROMPT) + 1) is FinishReason.LENGTH
    assert sequence().append(token(7), len(PROMPT) + 2) is None
    assert sequence(max_tokens=1).append(token(7), len(PROMPT)) is FinishReason.LENGTH  # beyond it, too


def test_one_that_goes_on_behind_its_limits_has_ended_all_the_same() -> None:
    one = sequence(max_tokens=1)
    one.append(token(7), 100)
    assert one.append(token(7), 100) is FinishReason.LENGTH


# --- scores of the prompt


def test_a_prompt_whose_scores_nobody_asked_for_has_none() -> None:
    assert sequence().is_scored
    assert sequence().scoring(5) is None


@pytest.mark.parametrize("scores", [0, 1, 5])
def test_every_token_but_the_first_is_scored_behind_the_one_before_it(scores: int) -> None:
    one = sequence(scores=scores)
    assert not one.is_scored
    assert one.scoring(5) == Scoring(first=0, targets=[11, 12, 13, 14], logprobs=scores)
    assert one.scoring(2) == Scoring(first=0, targets=[11, 12], logprobs=scores), "the token behind the chunk, too"


def test_a_chunk_scores_what_the_one_before_it_did_not() -> None:
    one = sequence(scores=0)
    for scored in (11, 12):
        one.score(token(scored))
    one.computed = 2
    assert one.scored == 3
    assert one.scoring(4) == Scoring(first=0, targets=[13, 14], logprobs=0)
    assert [score.token for score in one.take_scores()] == [11, 12]
    assert one.take_scores() == ()


def test_what_is_fed_again_is_scored_from_where_it_was_left() -> None:
    one = sequence(scores=0)
    for scored in (11, 12):
        one.score(token(scored))
    one.computed = 1  # it gave up blocks, and found one again
    assert one.scoring(5) == Scoring(first=1, targets=[13, 14], logprobs=0)
    assert one.scoring(2) is None, "all that this reaches was scored before"


def test_a_whole_prompt_is_scored_once() -> None:
    one = sequence(scores=0)
    for scored in PROMPT[1:]:
        assert not one.is_scored
        one.score(token(scored))
    assert one.is_scored
    assert one.scoring(5) is None
    assert sequence((10,), scores=0).is_scored, "the first token has no score"
    assert sequence((), scores=0).is_scored


# --- rules


def test_what_has_no_rules_takes_none_along() -> None:
    assert sequence().ruled(5, draws=True) is None
    assert not sequence().awaits_grammar


def test_a_grammar_is_told_before_the_first_draw_since_it_takes_time_to_compile() -> None:
    one = sequence(rules=GRAMMAR)
    assert one.awaits_grammar
    assert one.ruled(2, draws=False) == Ruled(drawn=0, past=Past(rules=GRAMMAR, start=2, tokens=[]))
    one.told = True
    assert not one.awaits_grammar
    assert one.ruled(2, draws=False) is None
    assert sequence(rules=BIAS).ruled(2, draws=False) is None
    assert not sequence(rules=BIAS).awaits_grammar


def test_rank_0_is_told_the_rules_with_what_they_look_back_on_and_then_only_how_far_it_is() -> None:
    one = sequence(rules=BIAS)
    assert one.ruled(4, draws=True) == Ruled(drawn=0, past=Past(rules=BIAS, start=5, tokens=[]))
    one.append(token(7), 100)
    one.append(token(8), 100)
    assert one.ruled(6, draws=True) == Ruled(drawn=2, past=Past(rules=BIAS, start=5, tokens=[7]))
    one.told = True
    assert one.ruled(6, draws=True) == Ruled(drawn=2)


def test_a_repetition_penalty_looks_back_on_the_prompt() -> None:
    assert sequence(rules=PENALTY).ruled(4, draws=True) == Ruled(
        drawn=0, past=Past(rules=PENALTY, start=0, tokens=[10, 11, 12, 13])
    )


# --- images


def test_the_images_of_a_chunk_are_those_that_it_reaches_into() -> None:
    first, second = prompt_image("a", 2, 2, 2), prompt_image("b", 8, 1, 2)  # tokens 2 to 5, and 8 and 9
    one = Sequence(
        1,
        GenerationRequest(
            request_id="1", prompt=tuple(range(12)), max_tokens=1, sampling=SamplingParams(), images=(first, second)
        ),
    )

    def seen(computed: int, end: int) -> list[str]:
        one.computed = computed
        return [span.digest for span in one.images(end)]

    assert seen(0, 2) == []
    assert seen(0, 3) == ["a"]
    assert seen(5, 8) == ["a"]
    assert seen(6, 8) == []
    assert seen(6, 9) == ["b"]
    assert seen(9, 12) == ["b"]
    assert seen(10, 12) == []
    assert seen(0, 12) == ["a", "b"]
    one.computed = 6
    assert one.shift == first.span.shift != 0
