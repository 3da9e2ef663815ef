"""How any spare gives birth: its supervisor orders a process, and it forks one that is the supervisor's child."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NoReturn

import msgspec

from lockstep_runtime.host import process_init

QUIET_SECONDS: Final = 2.0  # after a birth, in which the group has better things to do than to get ready for the next
Life = Callable[
    [process_init.Birth, list[int]], NoReturn
]  # a newborn's, with what `process_init.Birth` says it is given


def give_birth(orders: socket.socket, live: Life, prepare: Callable[[], None] | None = None) -> NoReturn:
    """Fork whatever is ordered, until nobody can order.

    With `prepare`, the next newborn is forked ahead while nothing is ordered, prepares itself and waits.
    """
    ahead: _Ahead | None = None
    while True:
        if prepare is not None and ahead is None and not _is_readable(orders, QUIET_SECONDS):
            ahead = _fork_ahead(orders, live, prepare)
        data, descriptors = _receive(orders)
        pid = ahead.take(data, descriptors) if ahead is not None else 0
        ahead, answer = None, str(pid)
        if not pid:
            try:
                pid = fork_orphan()
                answer = str(pid)
            except OSError as error:
                pid, answer = -1, f"no process could be forked: {error.strerror or error}"
        if not pid:
            orders.close()
            _begin(live, data, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        orders.send(answer.encode())


def _is_readable(orders: socket.socket, seconds: float) -> bool:
    waiting = select.poll()
    waiting.register(orders, select.POLLIN)
    return bool(waiting.poll(seconds * 1000))


def _receive(orders: socket.socket) -> tuple[bytes, list[int]]:
    data, descriptors, _, _ = socket.recv_fds(orders, 4096, 4, socket.MSG_CMSG_CLOEXEC)
    if not data:
        os._exit(0)
    return data, descriptors


@dataclass(frozen=True, slots=True)
class _Ahead:
    """A process that was forked before anybody ordered it; it ends with whoever holds the other end of its socket."""

    pid: int
    orders: socket.socket

    def take(self, data: bytes, descriptors: list[int]) -> int:
        """Hand the order on to it: its pid, or 0 if it is there no more."""
        with self.orders:
            try:
                socket.send_fds(self.orders, [data], descriptors)
            except OSError:
                return 0
        return self.pid


def _fork_ahead(orders: socket.socket, live: Life, prepare: Callable[[], None]) -> _Ahead | None:
    """None: there is no room for it now."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        pid = fork_orphan()
    except OSError:
        ours.close()
        theirs.close()
        return None
    if pid:
        theirs.close()
        return _Ahead(pid, ours)
    try:
        ours.close()
        orders.close()
        prepare()
        with theirs:
            data, descriptors = _receive(theirs)
        _begin(live, data, descriptors)
    finally:
        os._exit(1)


def _begin(live: Life, order: bytes, given: list[int]) -> NoReturn:
    """In the newborn."""
    go, *descriptors = given
    os.setpgid(0, 0)
    if not os.read(go, 1):
        os._exit(0)  # the supervisor did not wait for it
    os.close(go)
    try:
        live(msgspec.json.decode(order, type=process_init.Birth), descriptors)
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
    try:
        between = os.fork()
    except OSError:
        for end in (read_pid, write_pid, read_go, write_go):
            os.close(end)
        raise
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
            raise OSError("the kernel refuses to start another process")
        os.write(write_go, b"!")
        return int(told)
    finally:
        os.close(read_pid)
        os.close(write_go)
