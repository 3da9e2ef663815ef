"""Where a model thinks aloud: between two tokens of its own, which it draws or its template ends the prompt with.

Text that looks like a marker is none: in what users write, and in what the model quotes letter by letter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from lockstep_runtime.api.chat import strings_of
from lockstep_runtime.api.chat_template import Chat, ChatTemplate
from lockstep_runtime.api.tokenizer import TextTokenizer
from lockstep_runtime.config import ReasoningParser

OPENING: Final = "<think>"
CLOSING: Final = "</think>"
_NEAR: Final = 8  # tokens before the prompt's end: a marker and line breaks


@dataclass(frozen=True, slots=True)
class ReasoningMarkers:
    """The two tokens between which a model thinks aloud."""

    opening: int
    closing: int


def find_markers(added: Mapping[str, int], parser: ReasoningParser) -> ReasoningMarkers | None:
    """
    Args:
        added: the tokenizer's added tokens, by their text.

    Returns:
        None: the model's reasoning isn't parted from its answer, by choice or because its tokenizer has no such tokens.
    """
    opening, closing = added.get(OPENING), added.get(CLOSING)
    if parser == "none" or opening is None or closing is None:
        return None
    return ReasoningMarkers(opening, closing)


def opens_reasoning(markers: ReasoningMarkers, prompt: Sequence[int]) -> bool:
    """Whether a prompt ends inside an open reasoning section."""
    for token in reversed(prompt[-_NEAR:]):
        if token in (markers.opening, markers.closing):
            return token == markers.opening
    return False


def has_marker(markers: ReasoningMarkers, prompt: Sequence[int]) -> bool:
    """Whether a prompt ends with one, or nearly."""
    return any(token in (markers.opening, markers.closing) for token in prompt[-_NEAR:])


def opens_in(text: str) -> bool:
    """Whether a message that is to be continued ends inside an open reasoning section."""
    return text.rfind(OPENING) > text.rfind(CLOSING)


def is_open(
    markers: ReasoningMarkers | None,
    template: ChatTemplate,
    tokenizer: TextTokenizer,
    chat: Chat,
    prompt: Sequence[int],
    *,
    seconds: float,
    limit: int,
) -> bool:
    """Whether the template opened the reasoning. Where users wrote such a marker, too, what the template adds after the
    last message decides."""
    if markers is None or not opens_reasoning(markers, prompt):
        return False
    if not any(OPENING in text for text in strings_of((chat.messages, chat.tools, chat.variables))):
        return True
    with_prompt = template.render(chat, seconds=seconds, limit=limit)
    without = template.render(replace(chat, add_generation_prompt=False), seconds=seconds, limit=limit)
    pairs = enumerate(zip(with_prompt, without, strict=False))
    common = next((index for index, (one, other) in pairs if one != other), min(len(with_prompt), len(without)))
    return opens_reasoning(markers, tokenizer.encode(with_prompt[common:]))
