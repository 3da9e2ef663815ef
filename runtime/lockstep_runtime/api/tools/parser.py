"""What the parsers of all formats share: prose around calls, and what becomes of a call that is none after all."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final

from lockstep_runtime.api.tools.json_scanner import NotJsonError
from lockstep_runtime.api.tools.parts import (
    CallArguments,
    CallBegun,
    CallBroken,
    CallEnded,
    Part,
    Prose,
    merged,
)
from lockstep_runtime.api.tools.reader import EndOfTextError, Reader, Reading

MAX_NAME: Final = 256  # characters of a tool's name


class NotACallError(Exception):
    """What looked like a call is prose."""


class ToolParser(ABC):
    """Parts of one answer. However its text is cut into pieces, the parts are the same but for where they are cut.

    Line breaks beside a call belong to its markup, as templates write them. All other text is in the parts.
    """

    ends_reasoning = False  # a call within the reasoning ends it

    def __init__(self) -> None:
        self.thinking = False  # the text is reasoning
        self._reader = Reader()
        self._parts: list[Part] = []
        self._run = self._read()
        self._index = -1  # of the last call
        self._open = False  # it has begun and not ended
        self._whole = False  # nothing that it needs is missing
        self._closing = ""  # what its arguments end with
        self._before = ""  # the line breaks before it
        self._breaks = ""  # that end the prose so far
        self._after_call = False
        self._cut = False  # the text may be incomplete

    @abstractmethod
    def _read(self) -> Reading[None]:
        """Reads until the text ends."""

    def feed(self, text: str) -> list[Part]:
        """What is certain now."""
        self._reader.feed(text)
        next(self._run)
        return self._taken()

    def finish(self, *, cut: bool = False) -> list[Part]:
        """What was held back; another text may follow.

        Args:
            cut: the text may be incomplete: a call that is open stays so. Otherwise it is broken, unless only its end
                is missing.
        """
        self._reader.end()
        self._cut = cut
        next(self._run, None)
        if self._breaks and not self._after_call:
            self._parts.append(Prose(self._breaks))
        self._reader.restart()
        self._reader.forget()
        self._breaks, self._open, self._run = "", False, self._read()
        return self._taken()

    def _taken(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return merged(parts)

    def _prose_until(self, opening: re.Pattern[str], words: Sequence[str]) -> Reading[bool]:
        """Let prose out up to where `opening` matches, which is one of `words`; false: the text has ended."""
        reader = self._reader
        while True:
            found = opening.search(reader.text, reader.at)
            if found:
                self._prose(found.start() - reader.at)
                return True
            self._prose(reader.rest - reader.held(words))
            if not (yield from reader.more()):
                self._prose(reader.rest)
                return False

    def _attempt(self, call: Reading[None]) -> Reading[None]:
        """Read a call; what is none is prose."""
        try:
            yield from call
        except (NotACallError, NotJsonError):
            if self._open:
                self._break()
            else:
                self._say(self._reader.forget())
        except EndOfTextError:
            self._reader.take(self._reader.rest)
            if self._open and self._whole:
                self._end()
            elif not self._open:
                self._say(self._reader.forget())
            elif not self._cut:
                self._break()

    def _begin(self, name: str) -> None:
        self._index += 1
        self._open, self._whole, self._closing = True, False, "{}"
        self._before, self._breaks = self._breaks, ""
        self._parts.append(CallBegun(self._index, name))

    def _argue(self, json: str) -> None:
        if json:
            self._parts.append(CallArguments(self._index, json))

    def _end(self) -> None:
        self._argue(self._closing)
        self._parts.append(CallEnded(self._index))
        self._open, self._after_call = False, True
        self._reader.forget()

    def _break(self) -> None:
        self._parts.append(CallBroken(self._index, self._before + self._reader.forget()))
        self._open = self._after_call = False

    def _prose(self, count: int) -> None:
        self._say(self._reader.take(count))
        self._reader.taken.clear()

    def _say(self, text: str) -> None:
        if self._after_call:
            text = text.lstrip("\n")
            self._after_call = not text
        text = self._breaks + text
        kept = text.rstrip("\n")
        self._breaks = text[len(kept) :]
        if kept:
            self._parts.append(Prose(kept))


def is_name(name: str) -> bool:
    """Whether it may be a tool's: not a placeholder of a template, not prose."""
    return 0 < len(name) <= MAX_NAME and not any(character in "{}<>\"'" or character.isspace() for character in name)
