"""A file that whoever opens it waits for without end, as one on a network file system whose server is gone.

A FIFO that nobody writes to is mounted over it, in the mount namespace of one pod's container alone: open(2) of it does
not return, and nothing but SIGKILL ends the process that is in it. The pod's successor mounts its volumes anew.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.support.cluster_model import Object
from tests.support.cluster_processes import one_process

FIFO: Final = "/tmp/hanging"  # in the pod's own volume
SUPERVISOR: Final = "lockstep: supervisor"


@contextmanager
def hanging(pod: Object, path: str) -> Iterator[None]:
    """`path` is as the pod's container sees it."""
    pid = one_process(pod, SUPERVISOR)
    _in_the_mounts_of(pid, f"umask 022 && mkfifo {FIFO} && mount --bind {FIFO} {path}")
    try:
        yield
    finally:
        if Path(f"/proc/{pid}").exists():
            _in_the_mounts_of(pid, f"umount --lazy {path} && rm {FIFO}")


def waits_for_a_writer(pid: int) -> bool:
    """Whether the process has a thread within open(2) of a FIFO; of one that has ended, it hasn't."""
    try:
        waiting = [(task / "wchan").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return "wait_for_partner" in waiting


def _in_the_mounts_of(pid: int, script: str) -> None:
    """By the programs of the pod's image, with the rights of this process."""
    command = ["nsenter", f"--mount=/proc/{pid}/ns/mnt", "--", "sh", "-c", script]
    subprocess.run(command, check=True, timeout=30)
