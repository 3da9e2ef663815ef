"""Network namespaces: what a host's network lacks or has beside the usual, for servers and clients of a test."""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

T = TypeVar("T")
_CLONE_NEWNET: Final = 0x40000000
WITHOUT_IPV4: Final = "; ".join(
    ["ip addr del 127.0.0.1/8 dev lo", *(f"ip addr add fd00::{host}/128 dev lo nodad" for host in (1, 2))]
)
WITHOUT_IPV6: Final = "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6"


def why_not() -> str:
    """Why no namespace can be made here; empty where one can."""
    done = subprocess.run(["unshare", "-n", "ip", "link", "set", "lo", "up"], capture_output=True, check=False)
    return "" if done.returncode == 0 else "makes network namespaces, which needs root and iproute2"


def in_network(setup: str, scenario: Callable[[], T], seconds: float = 300.0) -> T:
    """Run it in a thread within a new network namespace, as are the processes that it starts.

    Args:
        setup: shell commands after the loopback is up.
    """
    result: list[T] = []
    errors: list[BaseException] = []

    def run(pid: int) -> None:
        try:
            _enter(pid)
            result.append(scenario())
        except BaseException as error:
            errors.append(error)

    with _holder(setup) as pid:
        thread = threading.Thread(target=run, args=(pid,))
        thread.start()
        thread.join(seconds)
        assert not thread.is_alive(), f"not over within {seconds:g} s"
    if errors:
        raise errors[0]
    return result[0]


@contextmanager
def _holder(setup: str) -> Iterator[int]:
    """A process that keeps the namespace."""
    script = f"set -e; ip link set lo up; {setup}; echo ready; exec sleep 3600"
    with subprocess.Popen(["unshare", "-n", "sh", "-c", script], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline() == b"ready\n"
            yield holder.pid
        finally:
            holder.kill()


def _enter(pid: int) -> None:
    """This thread, and no other."""
    namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(namespace, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    finally:
        os.close(namespace)
