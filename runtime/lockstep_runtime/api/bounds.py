"""How few tokens a text can have: what is certainly too long is refused before it is tokenized."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

from tokenizers import Tokenizer, models

# Composition (Unicode, 3.11) makes at most four characters one: a letter and three marks.
_COMPOSED: Final = {"NFC": 4, "NFKC": 4, "NFD": 1, "NFKD": 1, "Prepend": 1, "ByteLevel": 1}
_KEEP_EVERYTHING: Final = frozenset({"ByteLevel", "Digits", "Metaspace", "Punctuation", "UnicodeScripts"})


def longest_token(tokenizer: Tokenizer) -> int | None:
    """The most characters of a text that one token stands for; None where there is no such bound: a part of the
    tokenizer drops characters, or makes one unknown token of many."""
    if not _knows_every_character(tokenizer.model):
        return None
    composed = 1
    for part in _parts(tokenizer.normalizer, "normalizers"):
        if not _keeps_length(part):
            return None
        composed *= _COMPOSED.get(part["type"], 1)
    if not all(map(_keeps_all, _parts(tokenizer.pre_tokenizer, "pretokenizers"))):
        return None
    added = tokenizer.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip for token in added):  # they take any number of spaces with them
        return None
    return composed * max(map(len, tokenizer.get_vocab(with_added_tokens=True)), default=1)


def _knows_every_character(model: object) -> bool:
    return isinstance(model, models.BPE) and (model.unk_token is None or bool(model.byte_fallback))


def _parts(part: Any, inner: str) -> Iterator[dict[str, Any]]:
    """A part's settings, or those of all that it consists of."""
    waiting = [] if part is None else [json.loads(part.__getstate__())]
    while waiting:
        settings = waiting.pop()
        if settings["type"] == "Sequence":
            waiting += settings[inner]
        else:
            yield settings


def _keeps_length(part: dict[str, Any]) -> bool:
    if part["type"] == "Replace":
        pattern = part["pattern"].get("String")
        return isinstance(pattern, str) and len(part["content"]) >= len(pattern)
    return part["type"] in _COMPOSED


def _keeps_all(part: dict[str, Any]) -> bool:
    return part["type"] in _KEEP_EVERYTHING or (part["type"] == "Split" and part["behavior"] != "Removed")
