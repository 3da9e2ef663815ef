"""The processes inside pods and of the node, as the node sees them: the node of the embedded cluster is this machine.

A container's first process can't be killed from inside its own pid namespace, and images have no `kill`; from the host
both are plain.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Object = dict[str, Any]


def container_processes(pod: Object) -> dict[int, str]:
    """Host pid -> command line (as `ps` shows it) of every process in the pod's running containers."""
    statuses = pod.get("status", {}).get("containerStatuses", [])
    containers = [status["containerID"].rpartition("/")[2] for status in statuses if status.get("containerID")]
    found = {}
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            cgroups = (process / "cgroup").read_text()
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if command and any(container in cgroups for container in containers):
            found[int(process.name)] = command
    return found


def one_process(pod: Object, title: str) -> int:
    """The host pid of the pod's only process whose command line starts with `title`."""
    processes = container_processes(pod)
    matching = [pid for pid, command in processes.items() if command.startswith(title)]
    assert len(matching) == 1, f"{len(matching)} processes are called {title!r} in {processes}"
    return matching[0]


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal; SIGKILL unless another is named."""
    os.kill(pid, number)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process stands still (SIGSTOP) and goes on afterwards, whatever happens meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
