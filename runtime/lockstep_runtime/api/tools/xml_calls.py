"""Calls as Qwen3-Coder and Qwen3.5 write them: one element for the function, one for each parameter.

    <tool_call>
    <function=name>
    <parameter=key>
    value
    </parameter>
    </function>
    </tool_call>

A value has no quotation marks: its type is the tool's to say. It may contain what looks like an end; only an end with
more markup behind it is one.

Source: the models' chat templates.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from lockstep_runtime.api.tools.json_calls import CALL, CALL_END
from lockstep_runtime.api.tools.parser import NotACallError, ToolParser, is_name
from lockstep_runtime.api.tools.reader import EndOfTextError, Reading
from lockstep_runtime.api.tools.values import NULL, STRING, as_json, quoted, types_of

FUNCTION: Final = "<function="
FUNCTION_END: Final = "</function>"
PARAMETER: Final = "<parameter="
PARAMETER_END: Final = "</parameter>"
MAX_KEY: Final = 256
_OPENING: Final = re.compile(f"{CALL}|{FUNCTION}")
_GAP: Final = 64  # characters of space that may stand between an end and what is behind it
_CLOSED: Final = re.compile(rf"\n?{PARAMETER_END}\s{{0,{_GAP}}}(?={PARAMETER}|{FUNCTION_END}|{CALL_END})")
_UNCLOSED: Final = re.compile(rf"\n?(?={FUNCTION_END}\s{{0,{_GAP}}}{CALL_END})")  # the parameter's end is forgotten
_LAST: Final = re.compile(rf"\n?{PARAMETER_END}\s*\Z")
_MAY_END: Final = re.compile(r"\n?<|\n\Z")
_BEHIND: Final = {PARAMETER_END: (PARAMETER, FUNCTION_END, CALL_END), FUNCTION_END: (CALL_END,)}


class XmlCalls(ToolParser):
    """
    Args:
        schemas: the tools' parameters as JSON Schema, by the tools' names.
    """

    ends_reasoning = True  # Qwen3.5 may call while it thinks

    def __init__(self, schemas: Mapping[str, Any]) -> None:
        super().__init__()
        self._schemas = schemas

    def _read(self) -> Reading[None]:
        while (yield from self._prose_until(_OPENING, (CALL, FUNCTION))):
            yield from self._attempt(self._call())

    def _call(self) -> Reading[None]:
        reader = self._reader
        marked = yield from reader.skip(CALL)
        if marked:
            yield from reader.skip_space()
        if not (yield from reader.skip(FUNCTION)):
            raise NotACallError
        name = yield from self._name()
        if not (is_name(name) if marked else name in self._schemas and not self.thinking):
            raise NotACallError
        self._begin(name)
        while (yield from self._has_parameter()):
            yield from self._parameter(self._schemas.get(name))
            self._whole, self._closing = True, "}"
        self._end()
        yield from reader.skip_space()
        if (yield from reader.skip(CALL_END)):
            reader.forget()

    def _has_parameter(self) -> Reading[bool]:
        """
        Raises:
            NotACallError: neither a parameter comes nor the call's end.
        """
        yield from self._reader.skip_space()
        if (yield from self._reader.skip(PARAMETER)):
            return True
        if (yield from self._reader.skip(FUNCTION_END)) or (yield from self._reader.comes(CALL_END)):
            return False
        raise NotACallError

    def _name(self) -> Reading[str]:
        """What stands before `>`."""
        reader = self._reader
        while (end := reader.text.find(">", reader.at)) < 0:
            if reader.rest > MAX_KEY:
                raise NotACallError
            yield from reader.need()
        name = reader.take(end - reader.at)
        reader.take(1)
        if len(name) > MAX_KEY:
            raise NotACallError
        return name

    def _parameter(self, schema: Any) -> Reading[None]:
        key = yield from self._name()
        properties = schema.get("properties") if isinstance(schema, dict) else None
        types = types_of(properties.get(key) if isinstance(properties, dict) else None, schema)
        self._argue(("{" if self._closing == "{}" else ", ") + quoted(key) + ": ")
        self._whole, self._closing = False, ""
        if types[0] == STRING or types[:2] == (NULL, STRING):
            text = _StreamedString(self._argue, nullable=NULL in types)
            yield from self._value(text.add)
            text.close()
        else:
            pieces: list[str] = []
            yield from self._value(pieces.append)
            self._argue(as_json("".join(pieces), types))

    def _value(self, sink: Callable[[str], object]) -> Reading[None]:
        reader = self._reader
        while not reader.rest:
            yield from reader.need()
        yield from reader.skip("\n")
        while True:
            found = _MAY_END.search(reader.text, reader.at)
            sink(reader.take((found.start() if found else len(reader.text)) - reader.at))
            if found is None:
                yield from reader.need()
                continue
            if end := _CLOSED.match(reader.text, reader.at) or _UNCLOSED.match(reader.text, reader.at):
                reader.take(end.end() - reader.at)
                return
            if not _may_become_end(reader.text[reader.at : reader.at + 2 * _GAP]):
                sink(reader.take(1))
            elif not (yield from reader.more()):
                if _LAST.match(reader.text, reader.at) is None:
                    raise EndOfTextError
                reader.take(reader.rest)
                return


def _may_become_end(text: str) -> bool:
    """Whether more text may make it the end of a value."""
    text = text.removeprefix("\n")
    for end, behind in _BEHIND.items():
        if end.startswith(text):
            return True
        if text.startswith(end):
            rest = text[len(end) :].lstrip()
            return len(text) - len(end) - len(rest) <= _GAP and any(one.startswith(rest) for one in behind)
    return False


class _StreamedString:
    """JSON's string as its text comes. `nullable`: the whole text may also be a word for nothing."""

    def __init__(self, argue: Callable[[str], None], *, nullable: bool) -> None:
        self._argue = argue
        self._held = "" if nullable else None  # what may yet become such a word
        if not nullable:
            argue('"')

    def add(self, text: str) -> None:
        if self._held is not None:
            text = self._held + text
            if len(text) <= len("null"):
                self._held = text
                return
            self._held = None
            self._argue('"')
        self._argue(quoted(text)[1:-1])

    def close(self) -> None:
        if self._held is None:
            self._argue('"')
        else:
            self._argue("null" if self._held.lower() in ("null", "none") else quoted(self._held))
