"""Draws under a grammar: put off until it is compiled, valid at the end, and the same in any company and process."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch
from tests.support.serve import TINY_CHAT
from tokenizers import Tokenizer

from lockstep_runtime.grammar.vocabulary import read_vocabulary
from lockstep_runtime.protocol.step import Grammar, LogitRules, Past, Ruled, SamplingParams, SequenceSlice
from lockstep_runtime.sources.token_bytes import TokenBytes
from lockstep_runtime.worker.grammars import Grammars
from lockstep_runtime.worker.rulebook import Rulebook
from lockstep_runtime.worker.ruled_draws import Drawn, draw_by_rules

VOCABULARY = 2048
ENDS = (2045, 2047)
PROMPT = [5, 6, 7]
SECONDS = 60.0
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Ada", "Grace", "Алиса"]},
        "tags": {"type": "array", "items": {"type": "boolean"}},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}
TOKENIZER = read_vocabulary(TINY_CHAT, VOCABULARY)


def rulebook() -> Rulebook:
    return Rulebook(8, Grammars(TOKENIZER))


def rules(schema: Any = SCHEMA, **more: Any) -> LogitRules:
    return LogitRules(grammar=Grammar(kind="json_schema", text=json.dumps(schema), end_ids=ENDS), **more)


def slice_of(
    tokens: list[int], one: LogitRules, params: SamplingParams, *, told: bool, number: int = 1
) -> SequenceSlice:
    answered = len(tokens) - len(PROMPT)
    fed = 1 if answered else len(PROMPT)
    first = len(tokens) - fed
    past = None if told else Past(rules=one, start=len(PROMPT), tokens=tokens[len(PROMPT) : first])
    return SequenceSlice(
        sequence_id=number, position=first, tokens=tokens[first:], blocks=[0], sample=params,
        ruled=Ruled(drawn=answered, past=past),
    )  # fmt: skip


def logits_after(tokens: list[int]) -> torch.Tensor:
    """[1, vocabulary], of what came before; short answers are likelier."""
    row = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(sum(tokens) % 9973)) * 3
    row[0, list(ENDS)] += 3
    return row


def draw(book: Rulebook, tokens: list[int], one: LogitRules, params: SamplingParams, *, told: bool) -> Drawn:
    """As often as it is put off."""
    deadline = time.monotonic() + SECONDS
    while True:
        drawn = draw_by_rules(logits_after(tokens), [slice_of(tokens, one, params, told=told)], book)
        if not drawn.put_off:
            return drawn
        told = False
        assert time.monotonic() < deadline


def answer(one: LogitRules, params: SamplingParams, new_process_at: frozenset[int] = frozenset()) -> list[int]:
    book, tokens, told = rulebook(), list(PROMPT), False
    while len(tokens) < 300:
        if len(tokens) - len(PROMPT) in new_process_at:
            book = rulebook()
        drawn = draw(book, tokens, one, params, told=told)
        assert not drawn.failures
        told = True
        tokens.append(drawn.sampled[0].token)
        if tokens[-1] in ENDS:
            break
    return tokens[len(PROMPT) :]


def text_of(tokens: list[int]) -> str:
    tokenizer = Tokenizer.from_file(str(TINY_CHAT / "tokenizer.json"))
    texts = TokenBytes(tokenizer, frozenset(tokenizer.get_added_tokens_decoder()))
    return b"".join(texts.of(token) for token in tokens).decode()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("params", [{"temperature": 0}, {"temperature": 1.5}, {"top_k": 20, "top_p": 0.95}], ids=str)
def test_an_answer_is_valid_and_a_new_process_goes_on_with_it(params: dict[str, Any], seed: int) -> None:
    one = rules(frequency_penalty=0.2, repetition_penalty=1.1) if seed % 2 else rules()
    sampling = SamplingParams(seed=seed, **params)
    undisturbed = answer(one, sampling)
    assert undisturbed[-1] in ENDS
    found = json.loads(text_of(undisturbed[:-1]))
    assert set(found) == {"name", "tags"}
    assert found["name"] in ("Ada", "Grace", "Алиса")
    assert answer(one, sampling, frozenset({0, 1, 4, len(undisturbed) - 1})) == undisturbed


def test_a_draw_is_put_off_while_its_grammar_is_compiled_and_the_others_are_not() -> None:
    book, params = rulebook(), SamplingParams(temperature=0)
    slow = {"enum": [f"value number {number}" for number in range(20_000)]}
    free = SequenceSlice(sequence_id=2, position=0, tokens=PROMPT, blocks=[1], sample=params)
    asked = [slice_of(PROMPT, rules(slow), params, told=False), free]
    began = time.monotonic()
    drawn = draw_by_rules(logits_after(PROMPT).repeat(2, 1), asked, book)
    assert (drawn.put_off, [one.sequence_id for one in drawn.sampled]) == ([1], [2])
    assert drawn.sampled[0].token == int(logits_after(PROMPT).argmax())
    while drawn.put_off:
        assert time.monotonic() - began < SECONDS
        drawn = draw_by_rules(logits_after(PROMPT).repeat(2, 1), asked, book)
    assert [one.sequence_id for one in drawn.sampled] == [1, 2]


def test_what_can_not_go_on_fails_alone() -> None:
    params = SamplingParams(temperature=0)
    broken = LogitRules(grammar=Grammar(kind="regex", text="a(", end_ids=ENDS))
    strayed = [*PROMPT, 600]
    asked = [
        slice_of(PROMPT, broken, params, told=False),
        slice_of(strayed, rules(), params, told=False, number=2),  # its token doesn't match
        slice_of(PROMPT, rules(), params, told=False, number=3),
    ]
    deadline, book = time.monotonic() + SECONDS, rulebook()
    drawn = Drawn(put_off=[1])
    while drawn.put_off:
        assert time.monotonic() < deadline
        drawn = draw_by_rules(logits_after(PROMPT).repeat(3, 1), asked, book)
    assert [one.sequence_id for one in drawn.sampled] == [3]
    assert "regex" in drawn.failures[1]
    assert "can't go on" in drawn.failures[2]


def test_a_complete_answer_ends_however_many_tokens_it_should_have() -> None:
    params = SamplingParams(temperature=0)
    one = rules({"const": 7}, min_tokens=50, end_ids=list(ENDS))
    found = answer(one, params)
    assert (text_of(found[:-1]), found[-1] in ENDS) == ("7", True)
    longer = rules({"type": "array", "items": {"type": "boolean"}}, min_tokens=0)
    assert len(answer(longer, params)) < 50


def test_without_a_vocabulary_requests_fail_with_the_reason() -> None:
    book = Rulebook(4, Grammars(None, "tokenizer.json is missing"))
    drawn = draw(book, PROMPT, rules(), SamplingParams(), told=False)
    assert "tokenizer.json is missing" in drawn.failures[1]
