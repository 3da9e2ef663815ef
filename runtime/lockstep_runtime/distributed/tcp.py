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

from lockstep_runtime.distributed.errors import CommunicatorAborted, CommunicatorError, check_proof
from lockstep_runtime.distributed.host_collectives import PIECE_BYTES, HostCommunicator, Slots, add
from lockstep_runtime.distributed.rendezvous import RendezvousClient

HEADER: Final = struct.Struct("<QQ")  # of every piece: which exchange of this communicator it belongs to, and its bytes
SCATTERED_BYTES: Final = 128 * 1024  # from here on the network counts, not how often a rank is woken


class TcpCommunicator(HostCommunicator):
    """One rank's end: a connection to every other rank."""

    def __init__(self, meeting: RendezvousClient) -> None:
        """
        Raises:
            CommunicatorError: not everyone came, the meeting was called off, or the proof failed.
            FrameError, OSError: the others', and the network's own.
        """
        super().__init__(meeting.rank, meeting.size)
        self._frames, self._slots = _frames(self.size)  # this rank's own piece, and what the others sent
        self._scattered, self._scattered_slots = _frames(self.size)  # what each of them is sent, where that differs
        self._sequence = 0
        self._aborted = False
        self._closing = threading.Lock()  # so that no abort shuts down what has a closed connection's number by now
        self._meeting: RendezvousClient | None = meeting
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
            raise CommunicatorAborted("the communicator was aborted")

    def release(self) -> None:
        """Release this rank, and whoever waits for it; from any thread, any number of times."""
        self._aborted = True
        with self._closing:
            for peer in self._peers.values():
                with contextlib.suppress(OSError):  # closed, or shut down by the other end
                    peer.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.release()
        with self._closing:
            for peer in self._peers.values():
                peer.close()

    def _exchange(self, piece: Tensor, *, for_rank_0: bool = False) -> tuple[Tensor, ...]:
        slots = self._slots.like(piece)
        slots[self.rank].copy_(piece)
        others = self._peers.keys()
        mine, to = self._frames[self.rank][: HEADER.size + piece.nbytes], others & {0} if for_rank_0 else others
        self._swap(dict.fromkeys(to, mine), dict.fromkeys(() if for_rank_0 and self.rank else others, piece.nbytes))
        return slots

    def _sum(self, piece: Tensor) -> None:
        """A long piece crosses the network twice at most, however many ranks there are: each adds up one part of it."""
        if self.size == 2 or piece.nbytes < SCATTERED_BYTES:
            super()._sum(piece)
            return
        others, parts = self._peers.keys(), piece.tensor_split(self.size)
        mine, slots = parts[self.rank], self._slots.like(parts[self.rank])
        for other in others:
            self._scattered_slots.like(parts[other])[other].copy_(parts[other])
        frames = {other: self._scattered[other][: HEADER.size + parts[other].nbytes] for other in others}
        slots[self.rank].copy_(mine)
        self._swap(frames, dict.fromkeys(others, mine.nbytes))
        add(slots, mine)
        slots[self.rank].copy_(mine)
        frame = self._frames[self.rank][: HEADER.size + mine.nbytes]
        self._swap(dict.fromkeys(others, frame), {other: parts[other].nbytes for other in others})
        for other in others:
            parts[other].copy_(self._slots.like(parts[other])[other])

    def _swap(self, outgoing: dict[int, memoryview], incoming: dict[int, int]) -> None:
        """Send each of these ranks its frame, and receive so many bytes behind a header from each of those."""
        self.check()
        self._sequence += 1
        for frame in outgoing.values():
            HEADER.pack_into(frame, 0, self._sequence, len(frame) - HEADER.size)
        wanted = {other: self._frames[other][: HEADER.size + nbytes] for other, nbytes in incoming.items()}
        self._send(outgoing)
        if outgoing:
            self._send_and_receive(outgoing, wanted)
        else:
            self._receive(wanted)
        self.on_wait(None)
        for other, nbytes in incoming.items():
            if (found := HEADER.unpack_from(self._frames[other])) != (self._sequence, nbytes):
                raise CommunicatorError(
                    f"rank {other} sent {found} where {(self._sequence, nbytes)} was due: (number, bytes)"
                )

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
            self.on_wait(other)
            while room:
                room = self._read(other, room, socket.MSG_WAITALL)

    def _send_and_receive(self, unsent: dict[int, memoryview], wanted: dict[int, memoryview]) -> None:
        """By turns: who only sends, until all is sent, waits for one who does so, too."""
        while unsent or wanted:
            ready = select.poll()
            for other in unsent.keys() | wanted.keys():
                events = (select.POLLOUT if other in unsent else 0) | (select.POLLIN if other in wanted else 0)
                ready.register(self._peers[other], events)
            self.on_wait(next(iter(wanted or unsent)))
            ready.poll()
            self._send(unsent)
            for other, room in list(wanted.items()):
                wanted[other] = self._read(other, room, socket.MSG_DONTWAIT)
                if not wanted[other]:
                    del wanted[other]

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

    def _lost(self, other: int) -> CommunicatorError:
        """What to raise, unless it was our own doing."""
        self.check()
        return CommunicatorError(f"rank {other} left the communicator")


def _frames(count: int) -> tuple[list[memoryview], Slots]:
    """Room for a header and a piece each, and the room for the pieces."""
    frames = [memoryview(bytearray(HEADER.size + PIECE_BYTES)) for _ in range(count)]
    return frames, Slots([torch.frombuffer(one, dtype=torch.uint8, offset=HEADER.size) for one in frames])
