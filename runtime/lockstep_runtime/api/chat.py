"""From messages to the prompt's token ids, by the model's own chat template in a sandbox.

The template's text may contain special tokens; what users wrote must not become any: a message that says `<|im_end|>`
must not end its turn. Where users' text holds such a string, the rendered prompt is cut inside it and the parts are
tokenized apart, so the model reads the same characters as ordinary tokens. Everything else is tokenized in one go,
token for token as `transformers.apply_chat_template` does.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import pairwise
from time import monotonic
from typing import Any, Final, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox

from lockstep_runtime.api.errors import ApiError, invalid, unsupported
from lockstep_runtime.api.tokenizer import TextTokenizer

# Unicode's noncharacters: never part of a text that is interchanged (Unicode, 23.7).
_CUTS: Final = tuple(map(chr, range(0xFDD0, 0xFDF0)))
_OWN: Final = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """What a template is given. `variables` are the client's `chat_template_kwargs`."""

    messages: Sequence[Mapping[str, object]]
    variables: Mapping[str, object] = field(default_factory=dict)
    add_generation_prompt: bool = True


class TemplateTimeoutError(Exception):
    """The template took too long."""


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Looks at the clock with every look-up and call, so that a template can't keep its thread for long."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self._clock = threading.local()

    def set_deadline(self, deadline: float) -> None:
        """For templates that this thread renders."""
        self._clock.deadline = deadline

    def check_deadline(self) -> None:
        if monotonic() > self._clock.deadline:
            raise TemplateTimeoutError

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.check_deadline()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.check_deadline()
        return super().getitem(obj, argument)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.check_deadline()
        return super().call(context, obj, *args, **kwargs)


class ChatTemplate:
    """
    Args:
        source: Jinja, with what `transformers` adds to it: `raise_exception`, `strftime_now`, `break`, `continue`.
        tokens: `bos_token` and the like, by name.

    Raises:
        jinja2.TemplateSyntaxError: `source` is not a template.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        self._sandbox = _Sandbox()
        self._template = self._sandbox.from_string(source)
        self._tokens = dict(tokens)

    def render(self, chat: Chat, *, seconds: float, limit: int) -> str:
        """
        Raises:
            ApiError: 400, the template refused the messages, took too long or made more than `limit` characters.
        """
        for name in chat.variables:
            if name in _OWN or name in self._tokens:
                raise invalid(f"`{name}` can't be given in chat_template_kwargs", "chat_template_kwargs")
        values = {
            "messages": chat.messages,
            "add_generation_prompt": chat.add_generation_prompt,
            "tools": None,
            "documents": None,
            **self._tokens,
            **chat.variables,
        }
        self._sandbox.set_deadline(monotonic() + seconds)
        try:
            return "".join(self._bounded(self._template.generate(values), limit))
        except ApiError:
            raise
        except TemplateTimeoutError:
            raise invalid(f"The chat template took longer than {seconds:g} s", "messages") from None
        except jinja2.TemplateError as error:
            raise invalid(f"The chat template refused the messages: {error}", "messages") from None
        except Exception as error:  # foreign code on users' data: whatever it raises is about the messages
            reason = f"{type(error).__name__}: {error}"
            raise invalid(f"The chat template can't render the messages: {reason}", "messages") from None

    def _bounded(self, parts: Iterator[str], limit: int) -> Iterator[str]:
        length = 0
        for part in parts:
            self._sandbox.check_deadline()
            length += len(part)
            if length > limit:
                raise invalid(f"The chat template made more than {limit} characters of the messages", "messages")
            yield part


def encode_chat(
    template: ChatTemplate, tokenizer: TextTokenizer, chat: Chat, *, seconds: float, limit: int, most: int
) -> list[int]:
    """
    Args:
        most: tokens.

    Raises:
        ApiError: 400, see `ChatTemplate.render`.
        TooManyTokensError: see `TextTokenizer.encode`.
    """
    given = (chat.messages, chat.variables)
    if not any(True for text in _strings(given) for _ in tokenizer.break_points(text)):
        return tokenizer.encode(template.render(chat, seconds=seconds, limit=limit), most=most)
    cut = _unused_cut(given)
    messages, variables = _map_strings(given, lambda text: _insert(text, list(tokenizer.break_points(text)), cut))
    rendered = template.render(replace(chat, messages=messages, variables=variables), seconds=seconds, limit=limit)
    first, *further = rendered.split(cut)
    ids = tokenizer.encode(first, most=most)
    for part in further:
        ids += tokenizer.encode_further(part, most=most)
    return ids


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in (*value.keys(), *value.values()):
            yield from _strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_map_strings(item, change) for item in value]
    return value


def _unused_cut(given: object) -> str:
    used = {character for text in _strings(given) for character in _CUTS if character in text}
    for cut in _CUTS:
        if cut not in used:
            return cut
    raise invalid("The messages contain special tokens and every Unicode noncharacter of U+FDD0..U+FDEF", "messages")


def _insert(text: str, positions: list[int], cut: str) -> str:
    edges = [0, *positions, len(text)]
    return cut.join(text[start:end] for start, end in pairwise(edges))


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own it escapes nothing for HTML, as templates expect."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def text_of(content: object) -> str:
    """A message's content as text: a string, nothing, or a list of parts, of which only text is supported.

    Raises:
        ValueError: neither.
        ApiError: 400, a part of another type.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise ValueError("Input should be a string or a list of parts")
    return "\n".join(map(_text_of_part, content))


def _text_of_part(part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise ValueError("A part should be an object with a `type`")
    if kind != "text":
        raise unsupported(f"content part {kind[:40]}", "only parts of type text are taken")
    if not isinstance(part.get("text"), str):
        raise ValueError("A part of type text should have a string `text`")
    return str(part["text"])
