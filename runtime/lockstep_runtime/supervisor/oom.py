"""Whether the kernel killed a child for lack of memory, which SIGKILL alone does not show."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Final

from lockstep_runtime.host import cgroup
from lockstep_runtime.host.memory import mebibytes, total_bytes

FULL: Final = 0.95  # of the limit; the kernel counts in batches


class OutOfMemory:
    """Counts the kernel's kills in our control group against the children that a SIGKILL has ended."""

    def __init__(self, root: Path = cgroup.ROOT) -> None:
        self._root = root
        self._explained = cgroup.out_of_memory_kills(root)

    def explain(self, number: int | None, used: int = 0) -> str:
        """Of a child that this signal has ended, and that had used so many bytes at most: `killed by the kernel: out of
        memory (…)`; empty if it was not."""
        if number != signal.SIGKILL or cgroup.out_of_memory_kills(self._root) <= self._explained:
            return ""
        self._explained += 1
        return sentence(cgroup.memory_use(self._root), cgroup.most_used(self._root), total_bytes(self._root), used)


def sentence(use: cgroup.MemoryUse | None, most: int | None, total: int, used: int) -> str:
    """`most`: that the group ever used; `total`: what the machine has; `used`: by the process. Pure."""
    most = use.limit if use and most is None else most
    if use and most is not None and most >= FULL * use.limit:
        where = f"limit {mebibytes(use.limit)}, used {mebibytes(min(most, use.limit))}"
    else:
        where = f"the machine has {mebibytes(total)}, and none was left"
    own = f"; {mebibytes(used)} of this process were resident" if used else ""
    return f"killed by the kernel: out of memory ({where}{own})"
