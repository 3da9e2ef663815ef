"""Files in shared memory that belong to a pod's supervisor, whoever of the pod made them: none outlives it for good.

A supervisor is named by its pid and the moment that its process began, so that a file which outlived its owner is never
taken for another's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from lockstep_runtime.child import PARENT_VARIABLE

FOLDER_VARIABLE: Final = "LOCKSTEP_CACHE_DIR"  # of the weight cache
SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - memory that processes share, which is the point
_NAME: Final = re.compile(r"lockstep-[a-z]+-(\d+)-(\d+)-.+")
_START_FIELD: Final = 19  # of /proc/<pid>/stat, counted behind the command's name: clock ticks since boot


def folder(environment: Mapping[str, str]) -> Path:
    return Path(environment.get(FOLDER_VARIABLE) or SHARED_MEMORY)


def owner_of(pid: int) -> str | None:
    """What tells this process from all others of this boot; None when there is none (any more)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return f"{pid}-{fields[_START_FIELD]}"


def owner(environment: Mapping[str, str]) -> str | None:
    """The supervisor of this child process; None without one: nobody would remove what is left."""
    parent = environment.get(PARENT_VARIABLE, "")
    return owner_of(int(parent)) if parent.isdecimal() else None


def cache_file(environment: Mapping[str, str], rank: int) -> Path | None:
    """Where a rank's cached weights lie; None without a supervisor."""
    whose = owner(environment)
    return folder(environment) / f"lockstep-weights-{whose}-{rank}" if whose else None


def remove(environment: Mapping[str, str]) -> int:
    """By a supervisor at its start and its end: its own files, and those whose owner is dead. Returns how many."""
    mine, gone = owner_of(os.getpid()), 0
    for path in [path for place in {folder(environment), SHARED_MEMORY} for path in place.glob("lockstep-*")]:
        if match := _NAME.fullmatch(path.name):
            whose = f"{match[1]}-{match[2]}"
            if whose == mine or owner_of(int(match[1])) != whose:
                path.unlink(missing_ok=True)
                gone += 1
    return gone
