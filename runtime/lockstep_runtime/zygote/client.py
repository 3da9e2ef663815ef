"""The supervisor's end of the socket on which one zygote takes requests.

Nothing here blocks the event loop: a zygote may be stopped, and there are probes to answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from typing import Final

import msgspec

from lockstep_runtime.zygote.messages import (
    MAX_BYTES,
    ForkFailed,
    ForkRequest,
    decode_reply,
    receive_ready,
    send_request,
)

_EXIT_SECONDS: Final = 1.0  # for the kernel to free a large process


class ZygoteLostError(OSError):
    """It doesn't reply, or has ended: another is needed."""


class ZygoteClient:
    """`theirs` is the zygote's end of the socket, to be closed here once it has it."""

    def __init__(self) -> None:
        self._ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.setblocking(False)
        self.is_ready = False  # when it was last looked at
        self._is_lost = False
        self._in_use = asyncio.Lock()  # replies have no ids: one request at a time
        self._pidfds: list[int] = []  # of a loaded zygote

    def check_ready(self) -> bool:
        """Whether it has reported that it is ready."""
        if not self.is_ready and not self._is_lost:
            try:
                self._pidfds = receive_ready(self._ours)
                self.is_ready = True
            except BlockingIOError:
                pass
            except OSError:
                self._lose()
        return self.is_ready

    async def wait_until_ready(self) -> bool:
        """False: it has ended instead."""
        async with self._in_use:
            while not self.check_ready() and not self._is_lost:
                await _readable(self._ours.fileno())
            if self._is_lost:
                self._ours.close()
        return self.is_ready and not self._is_lost

    async def fork(self, seconds: float, request: ForkRequest) -> int:
        """The pid of a new process, once it has been told to start.

        Args:
            seconds: within which the zygote must reply.
            request: its descriptors stay open here.

        Raises:
            ZygoteLostError: it didn't reply in time, now or before.
            OSError: the kernel refused a process.
        """
        wait, start = os.pipe()
        try:
            async with self._in_use:
                pid = await self._request(seconds, msgspec.structs.replace(request, start=wait))
            os.write(start, b"!")
            return pid
        finally:
            os.close(wait)
            os.close(start)

    async def _request(self, seconds: float, request: ForkRequest) -> int:
        if self._is_lost:
            raise ZygoteLostError("it doesn't reply")
        try:
            async with asyncio.timeout(seconds):
                send_request(self._ours, request)
                data = await asyncio.get_running_loop().sock_recv(self._ours, MAX_BYTES)
        except TimeoutError:
            self._lose()
            raise ZygoteLostError(f"it gave no reply within {seconds:g} s") from None
        except OSError as error:
            self._lose()
            raise ZygoteLostError(f"it can't be asked: {error.strerror or error}") from error
        if not data or self._is_lost:
            self._lose()
            raise ZygoteLostError("it has ended")
        reply = decode_reply(data)
        if isinstance(reply, ForkFailed):
            raise OSError(reply.message)
        return reply.pid

    def _lose(self) -> None:
        """A late reply would be taken for that to another request."""
        self._is_lost = True
        self._ours.close()

    def end(self) -> None:
        """A zygote that nobody can ask any more exits by itself; a loaded one is killed, since it may be stopped."""
        self.check_ready()
        self._is_lost = True
        if self._in_use.locked():
            with contextlib.suppress(OSError):
                self._ours.shutdown(socket.SHUT_RDWR)  # whoever waits for its reply closes it
        else:
            self._ours.close()
        for pidfd in self._pidfds:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)

    async def ended(self) -> None:
        """Wait until a loaded zygote that was told to end has freed its memory, a second at most."""
        pidfds, self._pidfds = self._pidfds, []
        for pidfd in pidfds:
            try:
                async with asyncio.timeout(_EXIT_SECONDS):
                    await _readable(pidfd)
            except TimeoutError:
                pass
            finally:
                os.close(pidfd)


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    is_readable = asyncio.Event()
    loop.add_reader(descriptor, is_readable.set)
    try:
        await is_readable.wait()
    finally:
        loop.remove_reader(descriptor)
