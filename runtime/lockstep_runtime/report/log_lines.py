"""The lines of a log that a report takes: warnings, errors, tracebacks and the trail of recoveries; the newest."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final, TextIO

from lockstep_runtime.redaction import Redact

MAX_LINES: Final = 300
MAX_CHARACTERS: Final = 1000  # of a line
MAX_READ: Final = 16 << 10  # characters of a line
_KEPT: Final = re.compile(
    r"^\S+ (?:warning|error|critical) "  # as text
    r'|"level": ?"(?:warning|error|critical)"'  # as JSON
    r'|\bfault \d+|"fault": ?\d'
)
_NEXT: Final = re.compile(r"^(?:\s|Traceback |[\w.]+(?:Error|Exception)\b)")  # goes on with the line before


def read(file: TextIO) -> Iterator[str]:
    """Its lines; one that is longer than any of ours comes in parts."""
    return iter(lambda: file.readline(MAX_READ), "")


def select(lines: Iterable[str], redact: Redact) -> list[str]:
    """The newest lines about faults, warnings and errors, in their order."""
    newest = deque(_selected(lines), maxlen=MAX_LINES)
    return [redact(line)[:MAX_CHARACTERS] for line in newest]  # a secret that is cut before would not be found


def _selected(lines: Iterable[str]) -> Iterator[str]:
    kept = False
    for line in lines:
        kept = bool(_KEPT.search(line)) or (kept and bool(_NEXT.match(line)))
        if kept:
            yield line.rstrip("\n")
