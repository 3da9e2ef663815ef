"""How the ranks of an epoch that are in several pods find and connect each other.

Each listens on a port of its choice, tells it in the epoch's store, and connects to the ranks below it. Who connects
proves that it knows the group's token. Nobody listens any more once all are connected.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
import struct
import time
from collections.abc import Callable
from typing import Final

from torch._C._distributed_c10d import Store

from lockstep_runtime.parallel.errors import GroupAborted, GroupError

HELLO: Final = struct.Struct("<I32s")  # the rank that connects, and its proof
HELLO_SECONDS: Final = 1.0  # for one that has connected to say who it is
LOOK_SECONDS: Final = 0.01  # between two looks at whether the others are there, and the meeting is still on


class Meeting:
    """One rank's part in it.

    `host`: this rank's address, as the others reach it. `deadline`: monotonic. `cancelled` is asked while the others
    are waited for.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        host: str,
        token: str,
        deadline: float,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        self.rank, self.size = rank, size
        self._store, self._host, self._token = store, host, token.encode()
        self._deadline, self._cancelled = deadline, cancelled

    def connect(self) -> dict[int, socket.socket]:
        """A connection to every other rank, each with a time-out of LOOK_SECONDS.

        Raises:
            GroupError: somebody did not come in time, or it was called off.
            OSError, RuntimeError: the network's and the store's own.
        """
        with contextlib.ExitStack() as undo:
            listener = undo.enter_context(socket.create_server((self._host, 0), backlog=self.size))
            nonce = secrets.token_hex(16)
            self._store.set(f"listener-{self.rank}", f"{nonce} {listener.getsockname()[1]} {self._host}")
            peers: dict[int, socket.socket] = {}
            for other in range(self.rank):
                peers[other] = undo.enter_context(self._connect(other))
            listener.settimeout(LOOK_SECONDS)
            while missing := {*range(self.rank + 1, self.size)} - peers.keys():
                if found := self._accept(listener, nonce, missing):
                    peers[found[0]] = undo.enter_context(found[1])
            undo.pop_all()
            listener.close()
        for peer in peers.values():
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer.settimeout(LOOK_SECONDS)
        return peers

    def check(self, other: int) -> None:
        """
        Raises:
            GroupError: it is too late to wait any longer for this rank, or the meeting was called off.
        """
        if self._cancelled():
            raise GroupAborted("the meeting was called off")
        if time.monotonic() > self._deadline:
            raise GroupError(f"rank {other} did not join in time")

    def _connect(self, other: int) -> socket.socket:
        key = f"listener-{other}"
        while not self._store.check([key]):
            self.check(other)
            time.sleep(LOOK_SECONDS)
        nonce, port, host = self._store.get(key).decode().split(" ", 2)
        peer = socket.create_connection((host, int(port)), timeout=max(0.1, self._deadline - time.monotonic()))
        peer.sendall(HELLO.pack(self.rank, self._proof(nonce, self.rank)))
        return peer

    def _accept(self, listener: socket.socket, nonce: str, missing: set[int]) -> tuple[int, socket.socket] | None:
        """One of those that are missing, if one has connected."""
        try:
            peer, _ = listener.accept()
        except TimeoutError:
            self.check(min(missing))
            return None
        peer.settimeout(HELLO_SECONDS)
        with contextlib.suppress(OSError):
            hello = bytearray()
            while len(hello) < HELLO.size and (part := peer.recv(HELLO.size - len(hello))):
                hello += part
            if len(hello) == HELLO.size:
                rank, proof = HELLO.unpack(hello)
                if rank in missing and hmac.compare_digest(proof, self._proof(nonce, rank)):
                    return rank, peer
        peer.close()
        return None

    def _proof(self, nonce: str, rank: int) -> bytes:
        return hmac.digest(self._token, f"{nonce} {rank}".encode(), "sha256")
