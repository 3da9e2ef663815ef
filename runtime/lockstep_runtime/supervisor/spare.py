"""The supervisor's end of the socket on which a spare, the pod's or a rank's loaded one, takes orders.

Nothing here waits without giving way to the event loop: a spare may be stopped, and there are probes to answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from typing import Final

import msgspec

from lockstep_runtime.host import process_init

_END_SECONDS: Final = 1.0  # for the kernel, to clear up behind a large process
_ANSWER_BYTES: Final = 512


class SpareLostError(OSError):
    """It does not answer, or has ended: another is needed."""


class Spare:
    """`theirs` is the spare's end, to be closed here once it is handed over."""

    def __init__(self) -> None:
        self._ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.setblocking(False)
        self.was_warm = False  # when it was last listened to
        self._is_lost = False
        self._turn = asyncio.Lock()  # answers have no names: one order at a time
        self._process: list[int] = []  # a loaded spare's pidfd

    def fileno(self) -> int:
        """Readable once the spare is warm, or has ended."""
        return self._ours.fileno()

    def is_warm(self) -> bool:
        """Whether it has said so by now."""
        if not self.was_warm and not self._is_lost:
            with contextlib.suppress(OSError):
                word, self._process, _, _ = socket.recv_fds(
                    self._ours, len(process_init.WARM), 1, socket.MSG_CMSG_CLOEXEC
                )
                self.was_warm = word == process_init.WARM
        return self.was_warm

    async def bear(self, seconds: float, birth: process_init.Birth, *descriptors: int) -> int:
        """The pid of a new process. It waits for a byte, so that one of which we did not hear in time never becomes
        the rank.

        Raises:
            SpareLostError: the spare gave no answer within so many seconds, now or before.
            OSError: the kernel gave it no process.
        """
        wait, go = os.pipe()
        try:
            async with self._turn:
                answer = await self._ask(seconds, birth, wait, *descriptors)
            if not answer.isdigit():
                raise OSError(answer.decode(errors="replace"))
            os.write(go, b"!")
            return int(answer)
        finally:
            os.close(wait)
            os.close(go)

    async def _ask(self, seconds: float, birth: process_init.Birth, *descriptors: int) -> bytes:
        if self._is_lost:
            raise SpareLostError("it does not answer")
        try:
            async with asyncio.timeout(seconds):
                socket.send_fds(self._ours, [msgspec.json.encode(birth)], descriptors)
                answer = await asyncio.get_running_loop().sock_recv(self._ours, _ANSWER_BYTES)
        except TimeoutError:
            self._lose()
            raise SpareLostError(f"it gave no answer within {seconds:g} s") from None
        except OSError as error:
            self._lose()
            raise SpareLostError(f"it can't be asked: {error.strerror or error}") from error
        if not answer or self._is_lost:
            self._lose()
            raise SpareLostError("it has ended")
        return answer

    def _lose(self) -> None:
        """What it may still answer belongs to no order that anybody waits for."""
        self._is_lost = True
        self._ours.close()

    def end(self) -> None:
        """A spare that nobody can speak to any more ends by itself; a loaded one does even where it is stopped."""
        self.is_warm()
        self._is_lost = True
        if self._turn.locked():
            with contextlib.suppress(OSError):
                self._ours.shutdown(socket.SHUT_RDWR)  # who waits for its answer closes it
        else:
            self._ours.close()
        for process in self._process:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, signal.SIGKILL)

    async def gone(self) -> None:
        """Until a loaded spare that was told to end has given back its memory, or a second is over."""
        processes, self._process = self._process, []
        for process in processes:
            try:
                async with asyncio.timeout(_END_SECONDS):
                    await _readable(process)
            except TimeoutError:
                pass
            finally:
                os.close(process)


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    is_readable = asyncio.Event()
    loop.add_reader(descriptor, is_readable.set)
    try:
        await is_readable.wait()
    finally:
        loop.remove_reader(descriptor)
