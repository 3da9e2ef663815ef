"""Grammars compiled for a vocabulary, by llguidance (https://github.com/guidance-ai/llguidance).

Its work is counted, not timed, so that the same grammar and tokens always give the same answer, on any machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, grammar_from

from lockstep_runtime.protocol.step import Grammar

# What legitimate schemas need for a mask of 151,936 tokens, several times over: 1.3 ms at most; these are some 5 ms.
_LIMITS: Final = LLParserLimits(step_lexer_fuel=50_000, step_max_items=20_000, verbose_errors=False)
_QUIET: Final = 0
_SPACE: Final = r"[\x20\x09\x0A\x0D]{1,32}"  # as of a pretty printer, not without end


class GrammarError(ValueError):
    """The grammar can't be used, or can't go on. The message has the reason."""


Encode = Callable[[str], list[int]]


class Words:
    """A vocabulary in the form that llguidance's tokenizer asks for."""

    bos_token_id: Final = None

    def __init__(self, tokens: list[bytes], special: list[int], encode: Encode) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = special[0]  # whichever: what ends an answer is a grammar's own
        self._encode = encode

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):  # it tries bytes, too
            raise TypeError("text is encoded, not bytes")
        return self._encode(text)


def tokenizer_of(tokens: list[bytes], special: list[int], encode: Encode) -> LLTokenizer:
    """
    Args:
        tokens: by id, within a text; nothing for ids that stand for none.
        encode: how the model would write a text; where only one text can follow, its first token alone is allowed.
    """
    return LLTokenizer(TokenizerWrapper(Words(tokens, special, encode)), n_vocab=len(tokens))


BYTES: Final = 256  # a vocabulary of single bytes, and of one token that ends


def byte_tokenizer() -> LLTokenizer:
    """With which a grammar can be tried before there is a model."""
    tokens = [*(bytes((byte,)) for byte in range(BYTES)), b"<end>"]
    return tokenizer_of(tokens, [BYTES], lambda text: list(text.encode()))


def compile_grammar(grammar: Grammar, tokenizer: LLTokenizer) -> LLMatcher:
    """At its beginning.

    Raises:
        GrammarError: it is malformed, or asks for something that is not supported.
    """
    try:
        matcher = LLMatcher(tokenizer, _definition(grammar), log_level=_QUIET, limits=_LIMITS)
    except (ValueError, RecursionError) as error:
        raise GrammarError(sentence(str(error))) from None
    if matcher.is_error():
        raise GrammarError(sentence(matcher.get_error()))
    return matcher


def _definition(grammar: Grammar) -> str:
    match grammar.kind:
        case "json_schema":
            # `oneOf` is what pydantic writes for tagged unions, where it means the same as `anyOf`.
            return LLMatcher.grammar_from_json_schema(
                grammar.text, defaults={"whitespace_pattern": _SPACE, "coerce_one_of": True}
            )
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.text)
        case "lark":
            return LLMatcher.grammar_from_lark(grammar.text)
        case "gbnf":
            return grammar_from("gbnf", grammar.text)


def sentence(message: str) -> str:
    """Of one of llguidance's errors, which may quote all of the grammar and of its state."""
    lines = message.strip().partition("<state>")[0].splitlines() or [""]
    reason = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), "")
    return " ".join(filter(None, (lines[0].strip(), reason)))[:300]
