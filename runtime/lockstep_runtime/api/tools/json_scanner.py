"""JSON in a text that arrives in pieces: let through as it comes, up to where a value ends.

Only the structure is followed, as far as it takes to find the end. Whether it is JSON its reader finds out. Control
characters within strings are escaped: models write line breaks there, and JSON has none (RFC 8259, 7).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from lockstep_runtime.api.tools.reader import Reader, Reading

Sink = Callable[[str], object]

_STRUCTURE: Final = re.compile(r'["{}\[\]]|[^\s\w.,:+\-]')  # and what no JSON has outside of strings
_IN_STRING: Final = re.compile(r'["\\]')
_SCALAR_END: Final = re.compile(r'[\s,:{}\[\]"]|[^\w.+\-]')
_CONTROLS: Final = {code: f"\\u{code:04x}" for code in range(32)} | {9: "\\t", 10: "\\n", 13: "\\r"}
MAX_SCALAR: Final = 1024  # characters


class NotJsonError(Exception):
    """What comes can't be a part of JSON."""


def scan_value(reader: Reader, sink: Sink) -> Reading[None]:
    """Take one value, whatever it is; the reader stands at its first character.

    Raises:
        NotJsonError: it is none.
        EndOfTextError: it has no end.
    """
    first = reader.text[reader.at]
    if first in "{[":
        yield from _scan_container(reader, sink)
    elif first == '"':
        sink(reader.take(1))
        yield from _scan_string(reader, sink)
    else:
        yield from _scan_scalar(reader, sink)


def _scan_container(reader: Reader, sink: Sink) -> Reading[None]:
    depth = 0
    while True:
        found = _STRUCTURE.search(reader.text, reader.at)
        if found is None:
            sink(reader.take(reader.rest))
            yield from reader.need()
            continue
        if found[0] not in '"{}[]':
            raise NotJsonError
        sink(reader.take(found.end() - reader.at))
        if found[0] == '"':
            yield from _scan_string(reader, sink)
            continue
        depth += 1 if found[0] in "{[" else -1
        if not depth:
            return


def _scan_string(reader: Reader, sink: Sink) -> Reading[None]:
    """After the opening quotation mark."""
    while True:
        found = _IN_STRING.search(reader.text, reader.at)
        end = len(reader.text) if found is None else found.start()
        sink(reader.take(end - reader.at).translate(_CONTROLS))
        if found is None:
            yield from reader.need()
            continue
        if found[0] == '"':
            sink(reader.take(1))
            return
        while reader.rest < 2:  # a backslash and what it escapes
            yield from reader.need()
        sink(reader.take(2).translate(_CONTROLS))


def _scan_scalar(reader: Reader, sink: Sink) -> Reading[None]:
    """A number, true, false or null."""
    while (found := _SCALAR_END.search(reader.text, reader.at)) is None:
        if reader.rest > MAX_SCALAR:
            raise NotJsonError
        yield from reader.need()
    if found.start() == reader.at:
        raise NotJsonError
    sink(reader.take(found.start() - reader.at))
