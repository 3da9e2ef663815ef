"""The supervisor's end of the socket on which a spare, the pod's or a rank's loaded one, takes orders."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
from typing import Final

import msgspec

from lockstep_runtime import child

_END_SECONDS: Final = 1.0  # for the kernel, to clear up behind a large process


class Spare:
    """`theirs` is the spare's end, to be closed here once it is handed over."""

    def __init__(self) -> None:
        self._ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.setblocking(False)
        self._is_warm = False
        self._process: list[int] = []  # a loaded spare's pidfd

    def fileno(self) -> int:
        """Readable once the spare is warm, or has ended."""
        return self._ours.fileno()

    def is_warm(self) -> bool:
        """Whether it has said so by now."""
        if not self._is_warm:
            with contextlib.suppress(OSError):
                word, self._process, _, _ = socket.recv_fds(self._ours, len(child.WARM), 1, socket.MSG_CMSG_CLOEXEC)
                self._is_warm = word == child.WARM
        return self._is_warm

    def bear(self, seconds: float, birth: child.Birth, *descriptors: int) -> int:
        """The pid of a new process. It waits for a byte, so that one of which we did not hear in time never becomes
        the rank.

        Raises:
            OSError: the spare gave none within so many seconds.
        """
        wait, go = os.pipe()
        self._ours.settimeout(seconds)
        try:
            socket.send_fds(self._ours, [msgspec.json.encode(birth)], [wait, *descriptors])
            if not (pid := self._ours.recv(32)):
                raise OSError("it has ended")
            os.write(go, b"!")
            return int(pid)
        finally:
            os.close(wait)
            os.close(go)

    def end(self) -> None:
        """A spare that nobody can speak to any more ends by itself; a loaded one does even where it is stopped, and
        has given back its memory then."""
        self.is_warm()
        self._ours.close()
        for process in self._process:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, signal.SIGKILL)
            ended = select.poll()
            ended.register(process, select.POLLIN)
            ended.poll(_END_SECONDS * 1000)
            os.close(process)
