"""A fork whose child is a child of the supervisor, not of the process that forks: a double fork, as daemons do.

The process in between exits at once, and its child falls to the nearest ancestor that takes orphans (prctl(2),
PR_SET_CHILD_SUBREAPER), or to PID 1: in both cases the supervisor, which alone waits for processes.
"""

from __future__ import annotations

import errno
import os
import socket


def reparented_fork() -> int:
    """The child's pid; 0 in the child, which returns once it is the supervisor's.

    Raises:
        OSError: the kernel refuses another process.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        between = os.fork()
        if between == 0:
            ours.close()
            _fork_and_exit(theirs)
            if not theirs.recv(1):
                os._exit(0)  # the process that forks has ended meanwhile
            return 0
        os.waitpid(between, 0)
        pid = _pid_sent_to(ours)
        ours.send(b"!")
        return pid


def _fork_and_exit(outer: socket.socket) -> None:
    """In the process between; returns in its child alone."""
    pid = -1
    try:
        pid = os.fork()
        if pid:
            outer.send(str(pid).encode())
    except OSError as error:
        outer.send(f"-{error.errno}".encode())
    finally:
        if pid:
            os._exit(0)


def _pid_sent_to(outer: socket.socket) -> int:
    try:
        pid = int(outer.recv(32, socket.MSG_DONTWAIT))
    except BlockingIOError:  # the process between was killed
        pid = -errno.ECHILD
    if pid < 0:
        raise OSError(-pid, os.strerror(-pid))
    return pid
