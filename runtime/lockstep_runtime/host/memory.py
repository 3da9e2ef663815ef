"""How much memory there is for something new, before it is taken.

tmpfs is no place apart: what lies in /dev/shm counts towards the container's limit, at which the kernel kills instead
of refusing. So the file system, the control groups and the machine are all asked, and the least counts.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

from lockstep_runtime.host import cgroup


def available_bytes(root: Path = cgroup.ROOT) -> int:
    """The least of what the machine and the container have left."""
    machine = _meminfo(root)
    use = cgroup.memory_use(root)
    return min(machine["MemAvailable"], use.available) if use else machine["MemAvailable"]


def total_bytes(root: Path = cgroup.ROOT) -> int:
    """The least of what the machine and the container have in all."""
    machine = _meminfo(root)
    use = cgroup.memory_use(root)
    return min(machine["MemTotal"], use.limit) if use else machine["MemTotal"]


def file_bytes(folder: Path, root: Path = cgroup.ROOT) -> int:
    """The largest file that may be made in this folder; in one that is memory, what the container has left counts."""
    found = os.statvfs(folder)
    room = found.f_bavail * found.f_frsize
    return min(room, available_bytes(root)) if is_memory(folder) else room


def has_room(folder: Path, needed: int, root: Path = cgroup.ROOT) -> bool:
    """Whether `file_bytes` are so many, which is told faster."""
    found = os.statvfs(folder)
    if found.f_bavail * found.f_frsize < needed:
        return False
    return not is_memory(folder) or (_meminfo(root)["MemAvailable"] >= needed and cgroup.has_memory(needed, root))


def is_memory(folder: Path) -> bool:
    """Whether its files lie in memory: a tmpfs."""
    return _is_memory(folder.stat().st_dev)


@functools.cache
def _is_memory(device: int) -> bool:
    """What a file system is doesn't change. proc(5), mountinfo: `36 35 0:98 / /dev/shm rw - tmpfs …`."""
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if before.split(" ")[2] == number:
            return after.split(" ")[0] in ("tmpfs", "ramfs", "hugetlbfs")
    return False


def mebibytes(count: int) -> str:
    """For a sentence: `350 MiB`, `4.5 MiB`."""
    size = count / 2**20
    return f"{size:.0f} MiB" if size >= 100 or size == int(size) else f"{size:.1f} MiB"


def _meminfo(root: Path) -> dict[str, int]:
    """proc(5): `MemTotal:       24684084 kB`."""
    lines = (root / "proc/meminfo").read_text().splitlines()
    pairs = [line.split(":", 1) for line in lines if ":" in line]
    return {name: int(rest.split()[0]) * 1024 for name, rest in pairs if rest.split()}
