"""Where a pod's cached weights lie, and whose they are. No torch here: the supervisor owns the files and removes them.

A file belongs to one supervisor, named by its pid and the moment that its process began, so that a file which outlived
its owner is never taken for another's. Every rank has a file of its own; nobody else writes to it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from lockstep_runtime.child import PARENT_VARIABLE

FOLDER_VARIABLE: Final = "LOCKSTEP_CACHE_DIR"
FOLDER: Final = "/dev/shm"  # noqa: S108 - memory that outlives a worker, which is the point
_NAME: Final = re.compile(r"lockstep-weights-(\d+-\d+)-\d+(\.new)?")
_START_FIELD: Final = 19  # of /proc/<pid>/stat, counted behind the command's name: clock ticks since boot


def folder(environment: Mapping[str, str]) -> Path:
    return Path(environment.get(FOLDER_VARIABLE) or FOLDER)


def owner_of(pid: int) -> str | None:
    """What tells this process from all others of this boot; None when there is none (any more)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return f"{pid}-{fields[_START_FIELD]}"


def cache_file(environment: Mapping[str, str], rank: int) -> Path | None:
    """A worker's file; None without a supervisor, since nobody would remove it."""
    parent = environment.get(PARENT_VARIABLE, "")
    owner = owner_of(int(parent)) if parent.isdecimal() else None
    return folder(environment) / f"lockstep-weights-{owner}-{rank}" if owner else None


def remove(environment: Mapping[str, str]) -> int:
    """By a supervisor at its start and its end: its own files, and those whose owner is dead. Returns how many."""
    mine, gone = owner_of(os.getpid()), 0
    for path in folder(environment).glob("lockstep-weights-*"):
        match = _NAME.fullmatch(path.name)
        if match and (match[1] == mine or owner_of(int(match[1].partition("-")[0])) != match[1]):
            path.unlink(missing_ok=True)
            gone += 1
    return gone
