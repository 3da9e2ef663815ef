"""A model's vocabulary as grammars need it: the bytes that every token stands for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llguidance import LLTokenizer
from tokenizers import Tokenizer

from lockstep_runtime.grammar.compiler import Encode, tokenizer_of
from lockstep_runtime.sources.token_bytes import TokenBytes


class NoVocabularyError(ValueError):
    """The message says what is missing."""


def read_vocabulary(folder: Path, rows: int) -> LLTokenizer:
    """Takes a second or so, in which no other thread of Python runs.

    Args:
        rows: of the model's logits: as many tokens there are.

    Raises:
        NoVocabularyError: there is no tokenizer, or it names no special token.
    """
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the binding raises bare Exception for whatever is wrong with the file
        raise NoVocabularyError(f"{folder / 'tokenizer.json'}: {error}") from error
    added = tokenizer.get_added_tokens_decoder()
    special = sorted(id for id, token in added.items() if token.special and id < rows)
    if not special:
        raise NoVocabularyError("the tokenizer has no special token, so no token can end an answer")
    texts = TokenBytes(tokenizer, frozenset(added))
    tokens = [texts.of(id) for id in range(rows)]
    return tokenizer_of(tokens, special, _encoder(tokenizer, tokens, special))


def _encoder(tokenizer: Tokenizer, tokens: list[bytes], special: list[int]) -> Encode:
    """The model's own way to write a text, if that is possible within one: SentencePiece's kinds begin with a space."""
    by_bytes = {text: id for id, text in reversed(list(enumerate(tokens))) if text}
    for id in special:
        by_bytes.pop(tokens[id], None)
    longest = max(map(len, by_bytes), default=0)

    def encode(text: str) -> list[int]:
        wanted = text.encode()
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        if all(id < len(tokens) for id in ids) and b"".join(tokens[id] for id in ids) == wanted:
            return ids
        return _longest_first(wanted, by_bytes, longest)

    return encode


def _longest_first(text: bytes, by_bytes: Mapping[bytes, int], longest: int) -> list[int]:
    """Tokens that join to the text, or to its beginning where no token can follow."""
    found, start = list[int](), 0
    while start < len(text):
        ends = range(min(start + longest, len(text)), start, -1)
        end = next((end for end in ends if text[start:end] in by_bytes), None)
        if end is None:
            break
        found.append(by_bytes[text[start:end]])
        start = end
    return found
