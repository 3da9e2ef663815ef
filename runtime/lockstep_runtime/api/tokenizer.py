"""The model's own tokenizer, of any kind that the `tokenizers` library reads: text to ids, ids to text and bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from tokenizers import Encoding, Tokenizer

from lockstep_runtime.api.bounds import longest_token
from lockstep_runtime.api.errors import invalid
from lockstep_runtime.api.token_names import TokenNames
from lockstep_runtime.sources.token_bytes import TokenBytes

_PREFIX_CHARACTERS: Final = 8  # a token's, at most, in a text whose beginning is looked at first
_SLACK_TOKENS: Final = 1024  # more than a cut in the middle of a text can add


class UnsupportedTokenizerError(ValueError):
    """The tokenizer can't be used. The message has the reason."""


class TooManyTokensError(ValueError):
    """A text has more tokens than allowed. The message has their number, as far as it is known."""


class TextTokenizer:
    """A `tokenizer.json`: byte-level BPE (GPT-2, Qwen, Llama 3), SentencePiece's kinds (Llama 2, Mistral, Gemma), and
    whatever else the library decodes.

    `rows`: of the model's embedding. A tokenizer may know tokens beyond them, which the model can't be given.
    """

    def __init__(self, tokenizer: Tokenizer, rows: int | None = None) -> None:
        tokenizer.no_truncation()  # settings of the training run that wrote the file, not of the model
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.size = tokenizer.get_vocab_size(with_added_tokens=True)
        added = tokenizer.get_added_tokens_decoder()
        special = {id: token.content for id, token in added.items() if token.special}
        self.special_ids = frozenset(special)
        rowless = {id: token.content for id, token in added.items() if rows is not None and id >= rows}
        self._rowless = frozenset(text for id, text in rowless.items() if id in special)
        self._cut = _any_of({**special, **rowless}.values())
        self.added = {token.content: id for id, token in added.items()}
        self.bytes = TokenBytes(tokenizer, frozenset(added))
        self.names = TokenNames(self.bytes.of)
        self.longest_token = longest_token(tokenizer)
        self._line = self.encode("\n")

    @classmethod
    def from_file(cls, path: Path, rows: int | None = None) -> TextTokenizer:
        """
        Raises:
            UnsupportedTokenizerError: not a tokenizer file, or of a kind that the library does not know.
        """
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the binding raises bare Exception for whatever is wrong with the file
            raise UnsupportedTokenizerError(str(error)) from error
        return cls(tokenizer, rows)

    def encode(self, text: str, *, add_special_tokens: bool = False, most: int | None = None) -> list[int]:
        """Special tokens written in `text` become those tokens.

        Raises:
            TooManyTokensError: there are more than `most`; found out from the beginning of a text that is very long.
        """
        if most is not None and self._is_certainly_more(text, most):
            raise TooManyTokensError(f"more than {most}")
        encoding = self._encode(text, add_special_tokens)
        if most is not None and len(encoding) > most:
            raise TooManyTokensError(str(len(encoding)))
        ids: list[int] = encoding.ids
        return ids

    def _is_certainly_more(self, text: str, most: int) -> bool:
        prefix = _PREFIX_CHARACTERS * (most + _SLACK_TOKENS)
        if len(text) <= prefix:
            return False
        if self.longest_token is not None and len(text) > self.longest_token * most:
            return True
        return len(self._encode(text[:prefix], False)) > most + _SLACK_TOKENS

    def _encode(self, text: str, add_special_tokens: bool) -> Encoding:
        """As a batch of one: for a single text the binding keeps the interpreter's lock, and so every stream waits."""
        [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding

    def encode_further(self, text: str, *, most: int | None = None) -> list[int]:
        """As the continuation of another text: SentencePiece's kinds put a space before the first word of a text only.

        Source: `_encode_chat_piece` of transformers' chat_template_utils.
        """
        ids = self.encode("\n" + text, most=None if most is None else most + len(self._line))
        return ids[len(self._line) :] if ids[: len(self._line)] == self._line else self.encode(text, most=most)

    def id_of(self, token: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def token_of(self, id: int) -> str | None:
        """As the vocabulary writes it; None for ids of a padded vocabulary."""
        found: str | None = self._tokenizer.id_to_token(id)
        return found

    def break_points(self, text: str) -> Iterator[int]:
        """Where `text` must be cut so that no part of it encodes to a special token, nor to one without a row.

        Raises:
            ApiError: 400, a special token of one character can't be cut, and one without a row is no text.
        """
        position = 0
        while self._cut and (match := self._cut.search(text, position)):
            if match[0] in self._rowless:
                raise invalid(f"The text contains {match[0]!r}, a token that this model has no embedding for")
            if len(match[0]) == 1:
                raise invalid(f"The text contains {match[0]!r}, which this model reserves", code="reserved_token")
            position = match.start() + 1
            yield position

    def token_bytes(self, id: int) -> bytes:
        """What a token stands for within a text; nothing for ids of the padded vocabulary."""
        return self.bytes.of(id)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def decode_many(self, ids: Sequence[int]) -> str:
        """As `decode`, of any number: as a batch of one, see `_encode`."""
        [text] = self._tokenizer.decode_batch([ids], skip_special_tokens=False)
        return str(text)


def _any_of(strings: Iterable[str]) -> re.Pattern[str] | None:
    alternatives = sorted(filter(None, strings), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, alternatives))) if alternatives else None
