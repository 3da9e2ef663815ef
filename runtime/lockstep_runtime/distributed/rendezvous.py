"""Rendezvous of an epoch's ranks in several pods: they find and connect to each other.

Rank 0's process runs the rendezvous server. Every rank, rank 0 too, listens on a free port and registers it; when all
have registered, each gets the others' addresses and connects to the ranks below it. Every connection must prove that it
knows the group's token. Then the listeners close.

torch's TCPStore could do this, but looks up the host name of each client: where the name service doesn't answer, each
repair would take five or ten seconds longer.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Final, TypeVar

import msgspec

from lockstep_runtime.distributed.errors import CommunicatorAborted, CommunicatorError
from lockstep_runtime.host.addresses import family_of, join, split
from lockstep_runtime.protocol.framing import HEADER_BYTES, FrameError, decode, encode

SCHEME: Final = "tcp://"
NONCE_BYTES: Final = 16
HELLO_BYTES: Final = 1024  # the longest
HELLO_SECONDS: Final = 3.0  # for one that has connected to say who it is
LOOK_SECONDS: Final = 0.01  # between two looks at whether the meeting is still on

Address = tuple[str, int]
_M = TypeVar("_M")


class PeerHello(msgspec.Struct, frozen=True):
    """Who connects, where it listens, and the proof that it knows the token."""

    rank: int
    address: Address
    proof: bytes


class PeerList(msgspec.Struct, frozen=True):
    """Where every rank listens, in rank order."""

    addresses: list[Address]


_hello: Final = msgspec.msgpack.Decoder(PeerHello)
_present: Final = msgspec.msgpack.Decoder(PeerList)


class RendezvousServer:
    """Rank 0's. It is served by a thread of its own until all ranks have come, or it is closed."""

    keeps = False

    def __init__(self, host: str, size: int, token: str) -> None:
        self._listener = socket.create_server((host, 0), family=family_of(host), backlog=size)
        self._size, self._token = size, token
        self.address = f"{SCHEME}{join(host, self._listener.getsockname()[1])}"
        threading.Thread(target=self._serve, name="meeting", daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it has ended by itself
            self._listener.shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        with self._listener, contextlib.ExitStack() as stack:
            came: dict[int, tuple[socket.socket, Address]] = {}
            while len(came) < self._size:
                try:
                    peer, _ = self._listener.accept()
                except OSError:  # closed
                    return
                hello = admit(peer, self._token)
                if hello is not None and 0 <= hello.rank < self._size:
                    came[hello.rank] = (stack.enter_context(peer), hello.address)
                else:
                    peer.close()
            present = encode(PeerList([address for _, (_, address) in sorted(came.items())]))
            for peer, _ in came.values():
                with contextlib.suppress(OSError):  # it has left: the others will notice
                    peer.sendall(present)


class RendezvousClient:
    """One rank's part in it. `deadline` is monotonic; `cancelled` is asked while the others are waited for."""

    def __init__(
        self,
        place: str,
        rank: int,
        size: int,
        token: str,
        deadline: float,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        self.rank, self.size = rank, size
        self._place, self._token = split(place.removeprefix(SCHEME)), token
        self._deadline, self._cancelled = deadline, cancelled

    def connect(self) -> dict[int, socket.socket]:
        """A connection to every other rank, each with a time-out of LOOK_SECONDS.

        Raises:
            CommunicatorError: not everyone came in time, or it was called off.
            FrameError, OSError: the others', and the network's own.
        """
        with contextlib.ExitStack() as undo:
            with self._reach(self._place) as place:
                host = place.getsockname()[0]
                listener = undo.enter_context(
                    socket.create_server((host, 0), family=family_of(host), backlog=self.size)
                )
                listener.settimeout(LOOK_SECONDS)
                mine: Address = listener.getsockname()[:2]
                self._introduce(place, mine)
                self._await(place)
                addresses = _read(place, _present, HELLO_BYTES * self.size).addresses
            peers: dict[int, socket.socket] = {}
            for other in range(self.rank):
                peers[other] = undo.enter_context(self._reach(addresses[other]))
                self._introduce(peers[other], mine)
            while missing := {*range(self.rank + 1, self.size)} - peers.keys():
                if found := self._accept(listener, missing):
                    peers[found[0]] = undo.enter_context(found[1])
            undo.pop_all()
            listener.close()
        for peer in peers.values():
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer.settimeout(LOOK_SECONDS)
        return peers

    def check(self) -> None:
        """
        Raises:
            CommunicatorError: it is too late to wait any longer, or the meeting was called off.
        """
        if self._cancelled():
            raise CommunicatorAborted("the meeting was called off")
        if time.monotonic() > self._deadline:
            raise CommunicatorError("not every rank joined in time")

    def _reach(self, address: Address) -> socket.socket:
        return socket.create_connection(address, timeout=max(0.1, self._deadline - time.monotonic()))

    def _introduce(self, peer: socket.socket, mine: Address) -> None:
        self._await(peer)
        nonce = _read_bytes(peer, NONCE_BYTES)
        peer.sendall(encode(PeerHello(self.rank, mine, _proof(self._token, nonce, self.rank))))

    def _await(self, peer: socket.socket) -> None:
        """Until it sends something, however busy with others it is."""
        peer.settimeout(LOOK_SECONDS)
        while True:
            try:
                peer.recv(1, socket.MSG_PEEK)
                break
            except TimeoutError:
                self.check()
        peer.settimeout(HELLO_SECONDS)

    def _accept(self, listener: socket.socket, missing: set[int]) -> tuple[int, socket.socket] | None:
        """One of those that are missing, if one has connected."""
        try:
            peer, _ = listener.accept()
        except TimeoutError:
            self.check()
            return None
        hello = admit(peer, self._token)
        if hello is not None and hello.rank in missing:
            return hello.rank, peer
        peer.close()
        return None


def admit(peer: socket.socket, token: str) -> PeerHello | None:
    """Ask one that has connected for its name and its proof; None if it has none, or takes too long."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    try:
        peer.settimeout(HELLO_SECONDS)
        peer.sendall(nonce)
        hello = _read(peer, _hello, HELLO_BYTES)
    except (OSError, FrameError):
        return None
    return hello if hmac.compare_digest(hello.proof, _proof(token, nonce, hello.rank)) else None


def _read(peer: socket.socket, decoder: msgspec.msgpack.Decoder[_M], limit: int) -> _M:
    """One frame, and nothing of what may follow it.

    Raises:
        FrameError: it ended, or is not what is expected.
        OSError: the network's own.
    """
    length = int.from_bytes(_read_bytes(peer, HEADER_BYTES), "big")
    if length > limit:
        raise FrameError(f"a frame of {length} bytes; allowed are {limit}")
    return decode(decoder, _read_bytes(peer, length))


def _read_bytes(peer: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        if not (more := peer.recv(count - len(data))):
            raise FrameError("the connection was closed")
        data += more
    return data


def _proof(token: str, nonce: bytes, rank: int) -> bytes:
    return hmac.digest(token.encode(), nonce + str(rank).encode(), "sha256")
