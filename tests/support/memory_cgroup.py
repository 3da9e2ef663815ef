"""A real control group with a memory limit, of whichever version the machine has."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lockstep_runtime.host import cgroup


@dataclass(frozen=True)
class MemoryGroup:
    path: Path
    is_v2: bool

    @property
    def before(self) -> tuple[str, ...]:
        """Runs the rest of the command line in the group."""
        return ("sh", "-c", f'echo $$ > {self.path}/cgroup.procs && exec "$@"', "sh")

    def limit(self, count: int) -> None:
        """In bytes; what is used above it is taken back first, as far as the kernel can."""
        (self.path / ("memory.max" if self.is_v2 else "memory.limit_in_bytes")).write_text(str(count))

    def used(self) -> int:
        return int((self.path / ("memory.current" if self.is_v2 else "memory.usage_in_bytes")).read_text())


def why_not() -> str:
    """Why none can be made here; empty where one can."""
    try:
        with memory_group(2**30):
            return ""
    except OSError as error:
        return f"makes a memory control group: {error}"


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[MemoryGroup]:
    """Gone when it is over, if what ran in it has ended.

    Raises:
        OSError: none can be made.
    """
    found = cgroup.find_controller("memory")
    if found is None:
        raise OSError("no memory controller is mounted")
    path = found.groups[-1] / f"lockstep-test-{os.getpid()}-{time.monotonic_ns()}"
    path.mkdir()
    try:
        group = MemoryGroup(path, found.is_v2)
        group.limit(limit)
        yield group
    finally:
        deadline = time.monotonic() + 30
        while True:
            try:
                path.rmdir()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
