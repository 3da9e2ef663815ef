"""Grammars: what they allow, how they are tried, and that a new process goes on where the last one stood."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tests.support.serve import TINY_CHAT

from lockstep_runtime.grammar.checker import GrammarChecker
from lockstep_runtime.grammar.compiler import GrammarError, byte_tokenizer, compile_grammar
from lockstep_runtime.grammar.matcher import Mask, Matcher
from lockstep_runtime.grammar.vocabulary import NoVocabularyError, read_vocabulary
from lockstep_runtime.protocol.step import Grammar, Thoughts

BYTES = byte_tokenizer()
END = 256
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "kind": {"enum": ["a", "b"]}},
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


def of_schema(schema: Any, **more: Any) -> Grammar:
    return Grammar(kind="json_schema", text=json.dumps(schema), end_ids=(END,), **more)


def of_regex(pattern: str, **more: Any) -> Grammar:
    return Grammar(kind="regex", text=pattern, end_ids=(END,), **more)


def matcher(grammar: Grammar) -> Matcher:
    return Matcher(grammar, compile_grammar(grammar, BYTES))


def allowed(mask: Mask) -> set[int]:
    assert mask.bits is not None
    return {token for token in range(END + 1) if mask.bits[token // 8] >> token % 8 & 1}


def spell(grammar: Grammar, text: str) -> Matcher:
    """Byte by byte, each of which must be allowed."""
    found = matcher(grammar)
    for byte in text.encode():
        assert byte in allowed(found.mask()), text
        found.consume([byte])
    return found


def test_the_end_may_be_drawn_where_the_grammar_is_complete_and_must_be_where_nothing_can_follow() -> None:
    assert END not in allowed(spell(of_regex("ab?"), "").mask())
    open_end = spell(of_regex("ab?"), "a").mask()
    assert (allowed(open_end), open_end.must_end) == ({ord("b"), END}, False)
    closed = spell(of_regex("ab?"), "ab").mask()
    assert (allowed(closed), closed.must_end) == ({END}, True)
    assert allowed(spell(of_schema(PERSON), '{"name": "x", "age": 3, "kind": "b"}').mask()) == {END}


def test_what_does_not_match_is_not_allowed() -> None:
    assert allowed(spell(of_schema(PERSON), '{"name":"x","age":').mask()) <= set(b" \n\r\t-0123456789")
    with pytest.raises(GrammarError, match="can't go on"):
        matcher(of_regex("ab")).consume([ord("b")])


@pytest.mark.parametrize("opened", [True, False])
def test_thoughts_are_free_and_do_not_end_the_answer(opened: bool) -> None:
    opening, closing = 1, 2
    grammar = of_regex("ab", thoughts=Thoughts(opening=opening, closing=closing, open=opened))
    found = matcher(grammar)
    if not opened:
        assert allowed(found.mask()) == {opening, ord("a")}
        found.consume([opening])
    assert found.mask() == Mask(None, never=(END,))
    found.consume([*b"whatever", opening, 7])
    assert found.mask() == Mask(None, never=(END,))
    found.consume([closing])
    assert allowed(found.mask()) == {ord("a")}
    found.consume([ord("a"), ord("b")])
    assert allowed(found.mask()) == {END}


def test_an_answer_that_began_without_thoughts_has_none() -> None:
    found = matcher(of_regex("a\x01?b", thoughts=Thoughts(opening=1, closing=2)))
    found.consume([ord("a")])
    assert allowed(found.mask()) == {1, ord("b")}
    found.consume([1])
    assert allowed(found.mask()) == {ord("b")}


@pytest.mark.parametrize("seed", range(8))
def test_masks_depend_on_nothing_but_the_tokens(seed: int) -> None:
    """However they are consumed, and whatever else was made of the same compiled grammar."""
    rng = random.Random(seed)
    grammar = of_schema({"type": "array", "items": {"anyOf": [PERSON, {"type": "number"}, {"type": "string"}]}})
    compiled = compile_grammar(grammar, BYTES)
    one_by_one, drawn = Matcher(grammar, compiled), list[int]()
    for _ in range(120):
        mask = one_by_one.mask()
        options = sorted(allowed(mask) - {END})
        if not options:
            break
        cut = rng.randrange(len(drawn) + 1)
        again = Matcher(grammar, compiled)
        again.consume(drawn[:cut])
        if rng.random() < 0.5:
            again.mask()
        again.consume(drawn[cut:])
        assert again.mask() == mask
        drawn.append(rng.choice(options))
        one_by_one.consume(drawn[-1:])
    assert drawn


@pytest.fixture(scope="module")
def checker() -> Iterator[GrammarChecker]:
    found = GrammarChecker()
    yield found
    found.close()


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (of_schema(PERSON), ""),
        (of_schema({"type": "object"}), ""),
        (of_schema({"type": "string", "pattern": "^(a|aa)+(a|b|ab)*c{1,500}$"}), ""),  # no backtracking
        (of_regex("(x+x+)+y"), ""),
        (of_schema({"enum": [f"value {number}" for number in range(3000)]}), ""),
        (Grammar(kind="lark", text='start: "a" | "b" start', end_ids=(END,)), ""),
        (of_regex("a("), "unclosed"),
        (of_schema({"type": "quaternion"}), "quaternion"),
        (of_schema({"$ref": "#/$defs/nothing"}), "nothing"),
        (of_schema({"type": "string", "format": "no-such-format"}), "no-such-format"),
        (of_schema({"type": "integer", "minimum": 5, "maximum": 1}), "nsatisfiable"),
        (Grammar(kind="json_schema", text="[" * 5000, end_ids=(END,)), "recursion limit"),
        (Grammar(kind="lark", text="nonsense", end_ids=(END,)), "Expected"),
        (of_schema({"type": "integer", "multipleOf": 999_983}), "too complex"),
        (of_schema({"properties": {f"p{n}": {"type": "integer"} for n in range(2000)}}), "items|too complex"),
        (of_schema({"allOf": [{"type": "string", "pattern": f"^.*[a-{c}]{{3}}.*$"} for c in "cdefghijklmnopq"]}), " "),
    ],
    ids=lambda value: value.text[:60] if isinstance(value, Grammar) else value,
)  # fmt: skip
def test_a_grammar_is_tried_within_bounds(checker: GrammarChecker, grammar: Grammar, words: str) -> None:
    verdict = checker.check(grammar)
    assert re.search(words, verdict.error)
    assert bool(verdict.error) == bool(words)
    assert len(verdict.error) < 400
    began = time.monotonic()
    assert checker.check(grammar) == verdict == checker.known(grammar)
    assert time.monotonic() - began < 0.05  # remembered


def test_what_grammars_need_of_a_model_is_named(tmp_path: Any) -> None:
    assert read_vocabulary(TINY_CHAT, 2048).vocab_size == 2048
    with pytest.raises(NoVocabularyError, match=r"tokenizer\.json"):
        read_vocabulary(tmp_path, 2048)
