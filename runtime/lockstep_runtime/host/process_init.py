"""What every child process does first: end when its supervisor ends, and show what it is."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Final

from lockstep_runtime import log

PARENT_VARIABLE: Final = "LOCKSTEP_PARENT"
LOAD_FAILED_EXIT: Final = 3  # of a worker
CANT_LOAD_EXIT: Final = 4  # of a worker whose load can't succeed until something is mended
HISTORY_VARIABLE: Final = "LOCKSTEP_HISTORY"  # `stdin`: what the engine before said last is read from there
TERMINATION_MESSAGE: Final = 3  # the engine's descriptor of memory in which it writes why it ends
MAX_TERMINATION_MESSAGE: Final = 500
_PR_SET_PDEATHSIG: Final = 1  # prctl(2)


def become(part: str, title: str) -> None:
    """Tie this process to its supervisor's life, name it and set up its log."""
    log.configure(part)
    _die_with_parent()
    import setproctitle

    setproctitle.setproctitle(f"lockstep: {title}")


def write_termination_message(error: BaseException) -> None:
    """Why this process ends, for its supervisor, in one line; of several errors at once the first."""
    if PARENT_VARIABLE not in os.environ:
        return
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    text = error.strerror if type(error) is OSError and error.strerror else f"{type(error).__name__}: {error}"
    os.pwrite(TERMINATION_MESSAGE, " ".join(text.split()).encode()[:MAX_TERMINATION_MESSAGE], 0)


def _die_with_parent() -> None:
    """SIGKILL when the supervisor's process ends, even by SIGKILL; nothing of a group outlives it."""
    parent = int(os.environ.get(PARENT_VARIABLE, "0"))
    if not parent:
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died between our start and the call above
        sys.exit("the supervisor is gone")
