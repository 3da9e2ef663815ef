"""A zygote: a fork server, which forks the processes that its supervisor requests. It has one thread, and may block.

While nothing is requested it may fork one process ahead, the standby, which prepares itself and waits for a request.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from dataclasses import dataclass
from typing import Final, NoReturn

from lockstep_runtime.zygote.messages import (
    MAX_ERROR_CHARACTERS,
    Entrypoint,
    Forked,
    ForkFailed,
    ForkRequest,
    ZygoteGoneError,
    encode_reply,
    receive_request,
    send_request,
)
from lockstep_runtime.zygote.reparented_fork import reparented_fork

QUIET_SECONDS: Final = 2.0  # after a fork, in which the group has better things to do than to prepare a standby


def serve_forks(requests: socket.socket, entrypoint: Entrypoint, *, with_standby: bool = False) -> NoReturn:
    """Fork what is requested, until the supervisor has closed its end."""
    standby: _Standby | None = None
    while True:
        if with_standby and standby is None and not _is_readable(requests, QUIET_SECONDS):
            standby = _fork_standby(requests, entrypoint)
        request = _receive(requests)
        pid = standby.take(request) if standby is not None else None
        reply = Forked(pid) if pid is not None else _fork(requests, entrypoint, request)
        standby = None
        for descriptor in request.files().values():
            os.close(descriptor)
        with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
            requests.send(encode_reply(reply))


def _fork(requests: socket.socket, entrypoint: Entrypoint, request: ForkRequest) -> Forked | ForkFailed:
    """Returns in the zygote alone."""
    try:
        pid = reparented_fork()
    except OSError as error:
        return ForkFailed(f"no process could be forked: {error.strerror or error}"[:MAX_ERROR_CHARACTERS])
    if not pid:
        requests.close()
        _run_child(entrypoint, request)
    return Forked(pid)


def _run_child(entrypoint: Entrypoint, request: ForkRequest) -> NoReturn:
    """What a child does first: it waits until the supervisor knows its pid."""
    try:
        os.setpgid(0, 0)
        if request.start is not None and os.read(request.start, 1):
            os.close(request.start)
            entrypoint.run(request)
    finally:
        os._exit(1)  # never back into the zygote's loop


def _receive(requests: socket.socket) -> ForkRequest:
    try:
        return receive_request(requests)
    except ZygoteGoneError:
        os._exit(0)


def _is_readable(requests: socket.socket, seconds: float) -> bool:
    waiting = select.poll()
    waiting.register(requests, select.POLLIN)
    return bool(waiting.poll(seconds * 1000))


@dataclass(frozen=True, slots=True)
class _Standby:
    """A process that was forked before it was requested; it exits with the zygote, which holds its socket."""

    pid: int
    requests: socket.socket

    def take(self, request: ForkRequest) -> int | None:
        """Pass the request on to it; its pid, or None if it is gone."""
        with self.requests:
            try:
                send_request(self.requests, request)
            except OSError:
                return None
        return self.pid


def _fork_standby(requests: socket.socket, entrypoint: Entrypoint) -> _Standby | None:
    """None: the kernel refuses another process now."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        try:
            pid = reparented_fork()
        except OSError:
            ours.close()
            return None
        if pid:
            return _Standby(pid, ours)
        try:
            ours.close()
            requests.close()
            entrypoint.prepare()
            request = _receive(theirs)
            theirs.close()
            _run_child(entrypoint, request)
        finally:
            os._exit(1)
