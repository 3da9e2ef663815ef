"""Plain logs, one line each, to stderr: `HH:MM:SS.mmm level part: message`. The one place that configures logging."""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import Final

LEVEL_VARIABLE: Final = "LOCKSTEP_LOG_LEVEL"


class _LineFormatter(logging.Formatter):
    """One line per record; an exception's traceback follows only for records that carry one."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self._part = part

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        message = record.getMessage().replace("\n", "\\n")
        line = f"{clock}.{int(record.msecs):03d} {record.levelname.lower():7} {self._part}: {message}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def configure(part: str) -> None:
    """Log as `part` ("engine", "worker 1") from now on; the level comes from LOCKSTEP_LOG_LEVEL, else info."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LineFormatter(part))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    level = logging.getLevelNamesMapping().get(os.environ.get(LEVEL_VARIABLE, "info").upper(), logging.INFO)
    root.setLevel(level)
    for chatty in ("uvicorn.access", "httpx", "httpcore", "asyncio"):
        logging.getLogger(chatty).setLevel(max(level, logging.WARNING))
