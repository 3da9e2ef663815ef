"""From messages to the prompt's token ids, by the model's own chat template in a sandbox.

The template's text may contain special tokens; what users wrote must not become any: a message that says `<|im_end|>`
must not end its turn. Where users' text holds such a string, the rendered prompt is cut inside it and the parts are
tokenized apart, so the model reads the same characters as ordinary tokens. Everything else is tokenized in one go,
token for token as `transformers.apply_chat_template` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice, pairwise
from typing import Any, Final

from lockstep_runtime.api.chat_template import Chat, ChatTemplate
from lockstep_runtime.api.errors import invalid
from lockstep_runtime.api.tokenizer import TextTokenizer, TooManyTokensError

# Unicode's noncharacters: never part of a text that is interchanged (Unicode, 23.7).
_MARKS: Final = tuple(map(chr, range(0xFDD0, 0xFDF0)))


def encode_chat(
    template: ChatTemplate,
    tokenizer: TextTokenizer,
    chat: Chat,
    *,
    seconds: float,
    limit: int,
    most: int,
    add_special_tokens: bool = False,
) -> list[int]:
    """
    Args:
        most: tokens.
        add_special_tokens: those that the tokenizer adds to a text, beside what the template writes.

    Raises:
        ApiError: 400, see `ChatTemplate.render`.
        TooManyTokensError: see `TextTokenizer.encode`.
    """
    given = (chat.messages, chat.tools, chat.variables)
    if not any(True for text in strings_of(given) for _ in tokenizer.break_points(text)):
        text = _rendered(template, chat, seconds=seconds, limit=limit)
        return tokenizer.encode(text, add_special_tokens=add_special_tokens, most=most)
    cut = next(_unused_marks(given))
    cuts = 0

    def cut_up(text: str) -> str:
        nonlocal cuts
        positions = list(islice(tokenizer.break_points(text), most + 1 - cuts))
        cuts += len(positions)
        if cuts > most:  # and each begins a token
            raise TooManyTokensError(f"more than {most}")
        return _insert(text, positions, cut)

    messages, tools, variables = _map_strings(given, cut_up)
    cut_chat = replace(chat, messages=messages, tools=tools, variables=variables)
    first, *further = _rendered(template, cut_chat, seconds=seconds, limit=limit).split(cut)
    ids = tokenizer.encode(first, add_special_tokens=add_special_tokens, most=most)
    for part in further:
        ids += tokenizer.encode_further(part, most=most)
        if len(ids) > most:
            raise TooManyTokensError(f"more than {most}")
    return ids


def strings_of(value: object) -> Iterator[str]:
    """All strings in nested lists and objects, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in (*value.keys(), *value.values()):
            yield from strings_of(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from strings_of(item)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_strings(key, change): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_map_strings(item, change) for item in value]
    return value


def _rendered(template: ChatTemplate, chat: Chat, *, seconds: float, limit: int) -> str:
    """The last message of a chat that continues it is marked, and the text ends there; spaces behind it stay as the
    template left them.

    Source: `render_jinja_template` of transformers' chat_template_utils.
    """
    if not chat.continues:
        return template.render(chat, seconds=seconds, limit=limit)
    mark = next(_unused_marks((chat.messages, chat.tools, chat.variables)))
    *before, last = chat.messages
    marked = replace(chat, messages=[*before, {**last, "content": _with_end(last["content"], mark + " ")}])
    text, found, after = template.render(marked, seconds=seconds, limit=limit).rpartition(mark)
    if not found:
        message = "The chat template doesn't show the end of the last message, so that it can't be continued"
        raise invalid(message, "continue_final_message")
    return text if after.startswith(" ") else text.rstrip()


def _with_end(content: Any, end: str) -> Any:
    """A text, or parts, of which the last text counts, with an end."""
    if isinstance(content, str):
        return content + end
    parts = list(content)
    for index in range(len(parts) - 1, -1, -1):
        if "text" in parts[index]:
            parts[index] = {**parts[index], "text": parts[index]["text"] + end}
            break
    return parts


def _unused_marks(given: object) -> Iterator[str]:
    """
    Raises:
        ApiError: 400, there is none.
    """
    used = {character for text in strings_of(given) for character in _MARKS if character in text}
    yield from (mark for mark in _MARKS if mark not in used)
    raise invalid("The messages contain special tokens and every Unicode noncharacter of U+FDD0..U+FDEF", "messages")


def _insert(text: str, positions: list[int], cut: str) -> str:
    edges = [0, *positions, len(text)]
    return cut.join(text[start:end] for start, end in pairwise(edges))
