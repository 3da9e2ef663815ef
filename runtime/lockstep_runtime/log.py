"""Logs to stderr, a line each. The one place that configures logging.

`LOCKSTEP_LOG_FORMAT` is text, `2026-11-30T09:49:06.991Z info engine: …`, or json: objects of time, level, part, message
and, where there is one, exception. Times are UTC, in RFC 3339. `LOCKSTEP_LOG_LEVEL` names the least severe level.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime
from typing import Final

LEVEL_VARIABLE: Final = "LOCKSTEP_LOG_LEVEL"
FORMAT_VARIABLE: Final = "LOCKSTEP_LOG_FORMAT"


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
        fields = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "part": self._part,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


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
