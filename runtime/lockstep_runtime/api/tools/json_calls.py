"""Calls as JSON objects: `{"name": …, "arguments": {…}}`.

Hermes' format, which Qwen 2.5 and Qwen3 have, too: each within `<tool_call>` and `</tool_call>`.
Llama 3's: the answer is one or several objects, perhaps after `<|python_tag|>`; arguments are called `parameters`.

Source: the models' chat templates; https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1/
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, Final

import msgspec

from lockstep_runtime.api.tools.json_scanner import NotJsonError, scan_value
from lockstep_runtime.api.tools.parser import NotACallError, ToolParser, is_name
from lockstep_runtime.api.tools.reader import Reading

CALL: Final = "<tool_call>"
CALL_END: Final = "</tool_call>"
PYTHON_TAG: Final = "<|python_tag|>"
_ARGUMENTS: Final = ("arguments", "parameters")
_LLAMA_KEYS: Final = frozenset({"name", "type", "id", *_ARGUMENTS})
_CALL: Final = re.compile(re.escape(CALL))
_PYTHON_TAG: Final = re.compile(re.escape(PYTHON_TAG))


class _JsonCalls(ToolParser):
    def __init__(self) -> None:
        super().__init__()
        self._named = False
        self._arguments: str | None = None  # that came before the name, or with it

    def _is_call(self, name: str) -> bool:
        return is_name(name)

    def _may_have(self, key: str) -> bool:
        """Whether a call's object may have such a member."""
        return True

    def _object(self) -> Reading[None]:
        """
        Raises:
            NotACallError, NotJsonError, EndOfTextError: see `ToolParser._attempt`.
        """
        reader = self._reader
        yield from reader.skip_space()
        if not (yield from reader.skip("{")):
            raise NotACallError
        self._named, self._arguments = False, None
        while True:
            yield from reader.skip_space()
            key = yield from self._string()
            if not self._may_have(key):
                raise NotACallError
            yield from reader.skip_space()
            if not (yield from reader.skip(":")):
                raise NotJsonError
            yield from reader.skip_space()
            yield from self._member(key)
            yield from reader.skip_space()
            if (yield from reader.skip("}")):
                break
            if not (yield from reader.skip(",")):
                raise NotJsonError
        if not self._named:
            raise NotACallError
        self._end()

    def _member(self, key: str) -> Reading[None]:
        if key == "name" and not self._named:
            name = yield from self._string()
            if not self._is_call(name):
                raise NotACallError
            self._named = True
            self._begin(name)
            if self._arguments is not None:
                self._argue_whole(self._arguments)
        elif key in _ARGUMENTS and self._arguments is None:
            yield from self._read_arguments()
        else:
            yield from scan_value(self._reader, lambda _: None)

    def _read_arguments(self) -> Reading[None]:
        pieces: list[str] = []
        if self._named and self._reader.text.startswith("{", self._reader.at):
            self._closing = ""

            def stream(piece: str) -> None:
                pieces.append(piece)
                self._argue(piece)

            yield from scan_value(self._reader, stream)
            self._arguments = _object_in("".join(pieces))
            self._whole = True
        else:
            yield from scan_value(self._reader, pieces.append)
            self._arguments = _object_in("".join(pieces))
            if self._named:
                self._argue_whole(self._arguments)

    def _argue_whole(self, arguments: str) -> None:
        self._closing, self._whole = "", True
        self._argue(arguments)

    def _string(self) -> Reading[str]:
        if not self._reader.text.startswith('"', self._reader.at):
            raise NotJsonError
        pieces: list[str] = []
        yield from scan_value(self._reader, pieces.append)
        return str(_decode("".join(pieces)))


class HermesCalls(_JsonCalls):
    def _read(self) -> Reading[None]:
        while (yield from self._prose_until(_CALL, (CALL,))):
            yield from self._attempt(self._calls())

    def _calls(self) -> Reading[None]:
        """Usually one; some models write several between one pair of markers."""
        yield from self._reader.skip(CALL)
        yield from self._object()
        while True:
            yield from self._reader.skip_space()
            if (yield from self._reader.skip(CALL_END)):
                self._reader.forget()
                return
            yield from self._object()


class LlamaCalls(_JsonCalls):
    """Nothing marks a call, so only objects with a known tool's name are calls, and only where the answer begins with
    them or the marker is before them."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self._names = names

    def _is_call(self, name: str) -> bool:
        return name in self._names

    def _may_have(self, key: str) -> bool:
        return key in _LLAMA_KEYS

    def _read(self) -> Reading[None]:
        yield from self._attempt(self._calls())
        while (yield from self._prose_until(_PYTHON_TAG, (PYTHON_TAG,))):
            yield from self._attempt(self._calls())

    def _calls(self) -> Reading[None]:
        """As many as come one after another."""
        while True:
            yield from self._reader.skip_space()
            if (yield from self._reader.skip(PYTHON_TAG)):
                self._reader.taken.pop()  # a special token is no text
            yield from self._object()
            yield from self._reader.skip_space()
            if not (yield from self._reader.skip(";")):
                yield from self._reader.skip(",")


def _object_in(text: str) -> str:
    """The object that a value holds: itself, or in a string; nothing is no arguments.

    Raises:
        NotJsonError: it is none.
    """
    value = _decode(text)
    if value is None or value == "":
        return "{}"
    if isinstance(value, str):
        text, value = value, _decode(value)
    if not isinstance(value, dict):
        raise NotJsonError
    return text


def _decode(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        raise NotJsonError from None
