"""Collectives between the CPU ranks of several pods: each rank sends its piece straight to every other, over TCP.

A decode step makes dozens of all-reduces of a few KiB, so what counts is how often a rank must be woken. Here that is
once for each: the thread that computes also sends and receives. gloo, which torch has for CPUs, passes every part on
between threads and asks before it sends it. Nor can it be left reliably: a part that it was about to write when the
connection ended is waited for without end. Here `abort` shuts the connections down, and whatever waits on them, or ever
will, fails at once.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from typing import Final

import torch
from torch import Tensor

from lockstep_runtime.parallel.errors import GroupAborted, GroupError, check_proof
from lockstep_runtime.parallel.exchange import PIECE_BYTES, ExchangeGroup, Slots
from lockstep_runtime.parallel.meeting import Meeting

HEADER: Final = struct.Struct("<QQ")  # of every piece: which exchange of this communicator it belongs to, and its bytes


class TcpGroup(ExchangeGroup):
    """One rank's end: a connection to every other rank."""

    def __init__(self, meeting: Meeting) -> None:
        """
        Raises:
            GroupError: not everyone came, the meeting was called off, or the proof failed.
            FrameError, OSError: the others', and the network's own.
        """
        super().__init__(meeting.rank, meeting.size)
        self._frames = [memoryview(bytearray(HEADER.size + PIECE_BYTES)) for _ in range(self.size)]
        self._slots = Slots([torch.frombuffer(one, dtype=torch.uint8, offset=HEADER.size) for one in self._frames])
        self._sequence = 0
        self._aborted = False
        self._closing = threading.Lock()  # so that no abort shuts down what has a closed connection's number by now
        self._meeting: Meeting | None = meeting
        self._peers = meeting.connect()
        try:
            check_proof(self.all_reduce(torch.ones(1)).item(), self.size)
        except BaseException:
            self.close()
            raise
        self._meeting = None
        for peer in self._peers.values():
            peer.settimeout(None)

    def check(self) -> None:
        if self._aborted:
            raise GroupAborted("the communicator was aborted")

    def abort(self) -> None:
        """Release this rank, and whoever waits for it; from any thread, any number of times."""
        self._aborted = True
        with self._closing:
            for peer in self._peers.values():
                with contextlib.suppress(OSError):  # closed, or shut down by the other end
                    peer.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.abort()
        with self._closing:
            for peer in self._peers.values():
                peer.close()

    def _exchange(self, piece: Tensor, *, for_rank_0: bool = False) -> tuple[Tensor, ...]:
        self.check()
        self._sequence += 1
        slots = self._slots.like(piece)
        slots[self.rank].copy_(piece)
        header, length = (self._sequence, piece.nbytes), HEADER.size + piece.nbytes
        HEADER.pack_into(self._frames[self.rank], 0, *header)
        others = self._peers.keys()
        unsent = dict.fromkeys(others & {0} if for_rank_0 else others, self._frames[self.rank][:length])
        wanted = {other: self._frames[other][:length] for other in (() if for_rank_0 and self.rank else others)}
        self._send(unsent)
        if unsent:
            self._send_and_receive(unsent, wanted)
        else:
            self._receive(wanted)
        for other in wanted:
            if (found := HEADER.unpack_from(self._frames[other])) != header:
                raise GroupError(f"rank {other} sent piece {found}, where {header} was due: (number, bytes)")
        return slots

    def _send(self, unsent: dict[int, memoryview]) -> None:
        """As much as the kernel takes at once: a small piece as a whole. What is left, stays."""
        for other, data in list(unsent.items()):
            try:
                unsent[other] = data[self._peers[other].send(data, socket.MSG_DONTWAIT) :]
            except (BlockingIOError, TimeoutError):
                continue
            except OSError as error:
                raise self._lost(other) from error
            if not unsent[other]:
                del unsent[other]

    def _receive(self, wanted: dict[int, memoryview]) -> None:
        for other, room in wanted.items():
            while room:
                room = self._read(other, room, socket.MSG_WAITALL)

    def _send_and_receive(self, unsent: dict[int, memoryview], wanted: dict[int, memoryview]) -> None:
        """By turns: who only sends, until all is sent, waits for one who does so, too."""
        missing = dict(wanted)
        while unsent or missing:
            ready = select.poll()
            for other in unsent.keys() | missing.keys():
                events = (select.POLLOUT if other in unsent else 0) | (select.POLLIN if other in missing else 0)
                ready.register(self._peers[other], events)
            ready.poll()
            self._send(unsent)
            for other, room in list(missing.items()):
                missing[other] = self._read(other, room, socket.MSG_DONTWAIT)
                if not missing[other]:
                    del missing[other]

    def _read(self, other: int, room: memoryview, how: int) -> memoryview:
        """The room that is left."""
        try:
            read = self._peers[other].recv_into(room, 0, how)
        except BlockingIOError:
            return room
        except TimeoutError:  # sockets have one while the ranks meet
            if self._meeting is not None:
                self._meeting.check()
            return room
        except OSError as error:
            raise self._lost(other) from error
        if not read:
            raise self._lost(other)
        return room[read:]

    def _lost(self, other: int) -> GroupError:
        """What to raise, unless it was our own doing."""
        self.check()
        return GroupError(f"rank {other} left the communicator")
