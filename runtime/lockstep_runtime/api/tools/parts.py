"""What a model's answer consists of where it may call tools."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Prose:
    """Text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """The name is known; arguments follow. `index` counts the calls of one answer."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of JSON. All pieces of a call that has ended are one object, `{}` where it has none."""

    index: int
    json: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    index: int


@dataclass(frozen=True, slots=True)
class CallBroken:
    """What followed the name is no object of arguments.

    `text`: all that the model wrote as this call, line breaks before it included.
    """

    index: int
    text: str


Part = Prose | CallBegun | CallArguments | CallEnded | CallBroken


def merged(parts: Iterable[Part]) -> list[Part]:
    """Neighbours of one kind as one: an answer's pieces are as few as the text's."""
    result: list[Part] = []
    for part in parts:
        last = result[-1] if result else None
        if isinstance(part, Prose) and isinstance(last, Prose):
            result[-1] = Prose(last.text + part.text)
        elif isinstance(part, CallArguments) and isinstance(last, CallArguments) and part.index == last.index:
            result[-1] = CallArguments(part.index, last.json + part.json)
        else:
            result.append(part)
    return result
