"""How a blocked gloo collective is left: by shutting down the process's own gloo connections.

gloo has no abort that works from another thread. But a shutdown of the sockets it waits on releases it at once, and the
peers too, since their ends close. gloo's connections are told from any other by their ports: each has, at one end, the
port that a rank of the group listens on.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

Address = tuple[str, int]


def listening_ports() -> frozenset[Address]:
    """Where this process listens, as (host, port)."""
    return frozenset(_address(found.getsockname()) for found in _sockets() if _listens(found))


def shut_down(listeners: frozenset[Address]) -> int:
    """Shut down this process's connections to or from any of these listeners; how many they were."""
    count = 0
    for found in _sockets():
        with contextlib.suppress(OSError):  # not connected, or gone meanwhile
            ends = {_address(found.getsockname()), _address(found.getpeername())}
            if ends & listeners and not _listens(found):
                found.shutdown(socket.SHUT_RDWR)
                count += 1
    return count


def _listens(found: socket.socket) -> bool:
    return bool(found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _address(name: object) -> Address:
    """Without IPv6's flow and scope, and IPv4 addresses as such."""
    host, port, *_ = name if isinstance(name, tuple) else ("", 0)
    return str(host).removeprefix("::ffff:"), int(port)


def _sockets() -> Iterator[socket.socket]:
    """This process's TCP sockets, each as a duplicate that is closed when the next is asked for."""
    for name in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        with contextlib.suppress(OSError):  # closed meanwhile, or no socket
            if not stat.S_ISSOCK(os.fstat(name).st_mode):
                continue
            with socket.socket(fileno=os.dup(name)) as found:
                if found.type == socket.SOCK_STREAM and found.family in (socket.AF_INET, socket.AF_INET6):
                    yield found
