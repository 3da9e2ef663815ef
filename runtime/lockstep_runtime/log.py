"""Logs to stderr, a line each. The one place that configures logging.

`LOCKSTEP_LOG_FORMAT` is text, `2026-11-30T09:49:06.991Z info engine: …`, or json: objects of time, level, part, message
and, where there are any, the record's `fields` and exception. Times are UTC, in RFC 3339. `LOCKSTEP_LOG_LEVEL` names
the least severe level.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime
from typing import Any, Final

LEVEL_VARIABLE: Final = "LOCKSTEP_LOG_LEVEL"
FORMAT_VARIABLE: Final = "LOCKSTEP_LOG_FORMAT"
_FIELDS: Final = "fields"  # the record's attribute


def fields(
    *,
    fault: int | None = None,
    epoch: int | None = None,
    rank: int | None = None,
    rung: str | None = None,
    phase: str | None = None,
    request: str | None = None,
    seconds: float | None = None,
    kept: bool | None = None,
) -> dict[str, Any]:
    """What a record is about, for `extra=`: fields of its own in JSON, and of the record that handlers see."""
    given = {
        "fault": fault, "epoch": epoch, "rank": rank, "rung": rung, "phase": phase, "request": request,
        "seconds": None if seconds is None else round(seconds, 4), "kept": kept,
    }  # fmt: skip
    return {_FIELDS: {name: value for name, value in given.items() if value is not None}}


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """What the record was given by `fields`."""
    found: dict[str, Any] = getattr(record, _FIELDS, {})
    return found


class _TextFormatter(logging.Formatter):
    """One line per record; an exception's traceback follows only for records that carry one."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self._part = part

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage().replace("\n", "\\n")
        line = f"{_time(record)} {record.levelname.lower():7} {self._part}: {message}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _JsonFormatter(logging.Formatter):
    """One object per record, tracebacks within it."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self._part = part

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "part": self._part,
            "message": record.getMessage(),
            **fields_of(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def configure(part: str) -> None:
    """Log as `part` ("engine", "worker 1") from now on; the level comes from LOCKSTEP_LOG_LEVEL, else info."""
    handler = logging.StreamHandler(sys.stderr)
    as_json = os.environ.get(FORMAT_VARIABLE, "text") == "json"
    handler.setFormatter(_JsonFormatter(part) if as_json else _TextFormatter(part))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    level = logging.getLevelNamesMapping().get(os.environ.get(LEVEL_VARIABLE, "info").upper(), logging.INFO)
    root.setLevel(level)
    for chatty in ("uvicorn.access", "httpx", "httpcore", "asyncio"):
        logging.getLogger(chatty).setLevel(max(level, logging.WARNING))
