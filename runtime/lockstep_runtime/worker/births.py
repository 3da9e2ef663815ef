"""How any spare gives birth: its supervisor orders a process, and it forks one that is the supervisor's child."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import NoReturn

import msgspec

from lockstep_runtime import child

Life = Callable[[child.Birth, list[int]], NoReturn]  # a newborn's, with what `child.Birth` says it is given


def give_birth(orders: socket.socket, live: Life) -> NoReturn:
    """Fork whatever is ordered, until nobody can order."""
    while True:
        data, descriptors, _, _ = socket.recv_fds(orders, 4096, 4, socket.MSG_CMSG_CLOEXEC)
        if not data:
            os._exit(0)
        pid = fork_orphan()
        if pid == 0:
            orders.close()
            _begin(live, msgspec.json.decode(data, type=child.Birth), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        orders.send(str(pid).encode())


def _begin(live: Life, birth: child.Birth, go: int, *descriptors: int) -> NoReturn:
    """In the newborn."""
    os.setpgid(0, 0)
    if not os.read(go, 1):
        os._exit(0)  # the supervisor did not wait for it
    os.close(go)
    try:
        live(birth, list(descriptors))
    finally:
        os._exit(1)  # never back into the spare's loop


def fork_orphan() -> int:
    """Fork a process that is a child of the supervisor, not of this one: pid, or 0 in it, once it is.

    The one between them ends at once, and its child falls to the nearest process that takes orphans.

    Raises:
        OSError: there is no room for another process.
    """
    read_pid, write_pid = os.pipe()
    read_go, write_go = os.pipe()
    between = os.fork()
    if between == 0:
        pid = -1
        try:
            pid = os.fork()
            if pid:
                os.write(write_pid, str(pid).encode())
        finally:
            if pid:
                os._exit(0)
        for end in (read_pid, write_pid, write_go):
            os.close(end)
        if not os.read(read_go, 1):
            os._exit(0)
        os.close(read_go)
        return 0
    os.close(write_pid)
    os.close(read_go)
    try:
        told = os.read(read_pid, 32)
        os.waitpid(between, 0)
        if not told:
            raise OSError("no process could be forked")
        os.write(write_go, b"!")
        return int(told)
    finally:
        os.close(read_pid)
        os.close(write_go)
