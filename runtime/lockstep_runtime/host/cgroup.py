"""What this process's control groups grant it: memory, CPUs, and how often the kernel killed for want of memory.

Read from files alone, so that a test may lay them out below any root. Where a controller is mounted, and which group of
it is ours, is in /proc/self/mountinfo and /proc/self/cgroup; of a hierarchy that is seen from a container, or from a
cgroup namespace, only a part is mounted. A limit holds for all groups below it: the least along the path counts.

https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

ROOT: Final = Path("/")
_V2: Final = "cgroup2"
_UNLIMITED: Final = 1 << 60  # version 1 writes the largest multiple of a page there is


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Of the group on our path that has least left, in bytes."""

    limit: int
    used: int
    reclaimable: int  # of what is used: page cache that nothing has read lately

    @property
    def available(self) -> int:
        return max(0, self.limit - self.used + self.reclaimable)


@dataclass(frozen=True, slots=True)
class Controller:
    """Our group of one controller and those above it that can be seen, the innermost first."""

    is_v2: bool
    groups: tuple[Path, ...]


def find_controller(name: str, root: Path = ROOT) -> Controller | None:
    """Where the controller's files are; None when there is none. A hybrid system has it in one of the versions."""
    ours = _memberships(root)
    for mount in _mounts(root):
        if mount.kind != _V2 and name in mount.options and name in ours:
            return Controller(False, _path(root, mount, ours[name]))
    for mount in _mounts(root):
        if mount.kind == _V2 and "" in ours:
            found = Controller(True, _path(root, mount, ours[""]))
            if any((group / f"{name}.max").exists() for group in found.groups):
                return found
    return None


def memory_use(root: Path = ROOT) -> MemoryUse | None:
    """None where nothing limits our memory."""
    found = find_controller("memory", root)
    if found is None:
        return None
    uses = [use for group in found.groups if (use := _memory_of(group, is_v2=found.is_v2))]
    return min(uses, key=lambda use: use.available, default=None)


def has_memory(needed: int, root: Path = ROOT) -> bool:
    """Whether so many bytes are left: as `memory_use`, but `memory.stat`, for which the kernel adds up over all groups
    below, is read only where it decides. Version 1 has the limits of groups that can't be seen there, of the innermost.
    """
    found = find_controller("memory", root)
    if found is None:
        return True
    for depth, group in enumerate(found.groups):
        if (found.is_v2 or depth > 0) and _is_plenty(group, needed, is_v2=found.is_v2):
            continue
        use = _memory_of(group, is_v2=found.is_v2)
        if use is not None and use.available < needed:
            return False
    return True


def _is_plenty(group: Path, needed: int, *, is_v2: bool) -> bool:
    """Without giving anything back; also where nothing limits it."""
    names = ("memory.max", "memory.current") if is_v2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    limit, used = (_number(group / name) for name in names)
    return limit is None or used is None or limit - used >= needed


def cpu_quota(root: Path = ROOT) -> float | None:
    """CPUs that our groups may use on average; None where nothing limits them."""
    found = find_controller("cpu", root)
    if found is None:
        return None
    return min((cpus for group in found.groups if (cpus := _cpus_of(group, is_v2=found.is_v2))), default=None)


def cpus(root: Path = ROOT) -> float:
    """CPUs that this process can use: those it may run on (a cpuset narrows them), or its quota if that is less."""
    runnable = float(len(os.sched_getaffinity(0)))
    return min(runnable, cpu_quota(root) or runnable)


def out_of_memory_kills(root: Path = ROOT) -> int:
    """Number of processes of our group that the kernel has killed for lack of memory; 0 if unknown.

    Includes kills because the machine, not the group, was out of memory.
    """
    found = find_controller("memory", root)
    if found is None:
        return 0
    tables = (_table(group / ("memory.events" if found.is_v2 else "memory.oom_control")) for group in found.groups)
    return next((table["oom_kill"] for table in tables if "oom_kill" in table), 0)


def most_used(root: Path = ROOT) -> int | None:
    """Peak bytes of the group of `memory_use`; None if unknown (kernels before 5.19)."""
    found = find_controller("memory", root)
    if found is None:
        return None
    limited = [(use.available, group) for group in found.groups if (use := _memory_of(group, is_v2=found.is_v2))]
    if not limited:
        return None
    return _number(min(limited)[1] / ("memory.peak" if found.is_v2 else "memory.max_usage_in_bytes"))


@dataclass(frozen=True, slots=True)
class _Mount:
    kind: str
    top: str  # the group that is mounted
    point: str
    options: frozenset[str]


def _mounts(root: Path) -> Iterator[_Mount]:
    """proc(5), mountinfo: `36 35 98:0 /top /point rw,noatime master:1 - cgroup none rw,memory`."""
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, kinds = before.split(" "), after.split(" ")
        if len(fields) > 4 and len(kinds) > 2 and kinds[0] in ("cgroup", _V2):
            top, point = (text.replace("\\040", " ") for text in fields[3:5])
            yield _Mount(kinds[0], top, point, frozenset(kinds[2].split(",")))


def _memberships(root: Path) -> dict[str, str]:
    """Our group by controller; version 2's under the empty name. cgroups(7): `4:memory:/a/b`, `0::/a/b`."""
    found: dict[str, str] = {}
    for line in _lines(root / "proc/self/cgroup"):
        parts = line.split(":", 2)
        if len(parts) == 3:
            found |= dict.fromkeys(parts[1].split(","), parts[2])
    return found


def _path(root: Path, mount: _Mount, ours: str) -> tuple[Path, ...]:
    """From our group up to what is mounted. A group that isn't below that is not ours to see: then that itself."""
    point = root / mount.point.lstrip("/")
    inside = PurePosixPath(ours)
    parts: tuple[str, ...] = ()
    if inside.is_relative_to(mount.top) and ".." not in inside.parts:
        parts = inside.relative_to(mount.top).parts
    paths = [point.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    return tuple(path for path in paths if path.is_dir())


def _memory_of(group: Path, *, is_v2: bool) -> MemoryUse | None:
    stat = _table(group / "memory.stat")
    if is_v2:
        limit, used = _number(group / "memory.max"), _number(group / "memory.current")
        reclaimable = stat.get("inactive_file", 0)
    else:
        limit, used = _number(group / "memory.limit_in_bytes"), _number(group / "memory.usage_in_bytes")
        limit = min((one for one in (limit, stat.get("hierarchical_memory_limit")) if one is not None), default=None)
        reclaimable = stat.get("total_inactive_file", stat.get("inactive_file", 0))
    if limit is None or used is None or limit >= _UNLIMITED:
        return None
    return MemoryUse(limit, used, reclaimable)


def _cpus_of(group: Path, *, is_v2: bool) -> float | None:
    if is_v2:
        fields = next(_lines(group / "cpu.max"), "").split()
        quota, period = (_whole(fields[0]), _whole(fields[1])) if len(fields) == 2 else (None, None)
    else:
        quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
    return quota / period if quota and quota > 0 and period and period > 0 else None


def _table(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    pairs = [line.split() for line in _lines(path)]
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def _number(path: Path) -> int | None:
    """None for `max`, and where there is no such file."""
    return _whole(next(_lines(path), ""))


def _whole(text: str) -> int | None:
    with contextlib.suppress(ValueError):
        return int(text)
    return None


def _lines(path: Path) -> Iterator[str]:
    """Nothing where it can't be read."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return
    yield from text.splitlines()
