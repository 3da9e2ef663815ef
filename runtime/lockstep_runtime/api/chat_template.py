"""A model's chat template, rendered in a sandbox with what `transformers` adds to Jinja.

Source: `_cached_compile_jinja_template` of transformers' chat_template_utils.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from time import monotonic
from typing import Any, Final, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

from lockstep_runtime.api.errors import ApiError, invalid

_OWN: Final = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """What a template is given. `variables` are the client's `chat_template_kwargs`."""

    messages: Sequence[Mapping[str, object]]
    tools: Sequence[Mapping[str, object]] | None = None
    variables: Mapping[str, object] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continues: bool = False  # the last message stays open


class TemplateTimeoutError(Exception):
    """The template took too long."""


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here they are rendered as they are, in a scope of
    their own as in transformers."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own attribute

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: jinja2.runtime.Macro) -> str:
        return str(caller())


class _Dict:
    """`dict`, of which a template gets the constructors only."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Looks at the clock with every look-up and call, so that a template can't keep its thread for long."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols])
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals["dict"] = _Dict()
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
        source: Jinja, with what `transformers` adds to it: `raise_exception`, `strftime_now`, `generation`,
            `break`, `continue`, a `tojson` that escapes nothing.
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
            "tools": chat.tools,
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
