"""Files in shared memory, owned by a pod's supervisor: those of dead supervisors are removed.

A supervisor is named by its pid, the moment that its process began, and its pid namespace, so that a file which
outlived its owner is never taken for another's. Containers may share the memory and yet not see each other's processes,
so every supervisor holds a lock on a file beside its others for as long as it lives.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from lockstep_runtime.host.process_init import PARENT_VARIABLE

FOLDER_VARIABLE: Final = "LOCKSTEP_CACHE_DIR"  # of the weight cache
SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - memory that processes share, which is the point
UNCLAIMED_SECONDS: Final = 3600.0  # the age from which a file counts as left behind that nobody can be asked about
_NAME: Final = re.compile(r"lockstep-[a-z]+-((\d+)-\d+(?:-ns(\d+))?)-.+")
_START_FIELD: Final = 19  # of /proc/<pid>/stat, counted behind the command's name: clock ticks since boot


def folder(environment: Mapping[str, str]) -> Path:
    return Path(environment.get(FOLDER_VARIABLE) or SHARED_MEMORY)


def owner_of(pid: int) -> str | None:
    """Identifies a process among all of this boot; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return f"{pid}-{fields[_START_FIELD]}-ns{_pid_namespace()}"


def owner(environment: Mapping[str, str]) -> str | None:
    """The supervisor of this child process; None without one: nobody would remove what is left."""
    parent = environment.get(PARENT_VARIABLE, "")
    return owner_of(int(parent)) if parent.isdecimal() else None


def cache_file(environment: Mapping[str, str], rank: int) -> Path | None:
    """Where a rank's cached weights lie; None without a supervisor."""
    whose = owner(environment)
    return folder(environment) / f"lockstep-weights-{whose}-{rank}" if whose else None


def fetch_file(environment: Mapping[str, str]) -> Path | None:
    """Where the pod's fetcher says how far it is; None without a supervisor."""
    whose = owner(environment)
    return fetch_file_of(environment, whose) if whose else None


def fetch_file_of(environment: Mapping[str, str], whose: str) -> Path:
    return folder(environment) / f"lockstep-fetch-{whose}-state"


def claim(environment: Mapping[str, str]) -> list[int]:
    """By a supervisor before there are any: descriptors that show others, while they are open, that it lives."""
    held = []
    for place in _places(environment):
        with contextlib.suppress(OSError):  # there can be no files either
            descriptor = os.open(place / _claim_name(owner_of(os.getpid()) or ""), os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held.append(descriptor)
    return held


def remove(environment: Mapping[str, str]) -> int:
    """By a supervisor at its start and its end: its own files, and those whose owner is dead. Returns how many."""
    verdicts: dict[tuple[Path, str], bool] = {}
    gone = 0
    for path, whose, pid, namespace in _owned(environment):
        known = (path.parent, whose)
        if known not in verdicts:
            verdicts[known] = _is_mine_or_nobodys(path, whose, pid, namespace)
        if verdicts[known]:
            path.unlink(missing_ok=True)
            gone += 1
    return gone


def _is_mine_or_nobodys(path: Path, whose: str, pid: int, namespace: int | None) -> bool:
    if namespace == _pid_namespace():
        return whose == owner_of(os.getpid()) or owner_of(pid) != whose
    try:
        descriptor = os.open(path.with_name(_claim_name(whose)), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return _age(path) > UNCLAIMED_SECONDS
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False  # it lives
    finally:
        os.close(descriptor)
    return True


def _owned(environment: Mapping[str, str]) -> Iterator[tuple[Path, str, int, int | None]]:
    """Every file with an owner: its name, pid and pid namespace."""
    for path in [path for place in _places(environment) for path in place.glob("lockstep-*")]:
        if match := _NAME.fullmatch(path.name):
            yield path, match[1], int(match[2]), int(match[3]) if match[3] else None


def _places(environment: Mapping[str, str]) -> set[Path]:
    return {folder(environment), SHARED_MEMORY}


def _claim_name(whose: str) -> str:
    return f"lockstep-owner-{whose}-lives"


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _pid_namespace() -> int:
    return Path("/proc/self/ns/pid").stat().st_ino
