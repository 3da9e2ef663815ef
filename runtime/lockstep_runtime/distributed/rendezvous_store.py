"""torch's key-value store over a finished rendezvous: NCCL's ranks get rank 0's address from it.

torch's own TCPStore has no authentication and looks up the host name of each client.
"""

from __future__ import annotations

import datetime
import socket
import time
from typing import Final

import msgspec
from torch._C._distributed_c10d import Store

from lockstep_runtime.distributed.errors import CommunicatorError
from lockstep_runtime.distributed.rendezvous import RendezvousClient
from lockstep_runtime.protocol.framing import HEADER_BYTES, FrameError, Framer, decode, encode

ENTRY_BYTES: Final = 64 * 1024  # the longest; NCCL's has 128
_CHUNK: Final = 4096


class Entry(msgspec.Struct, frozen=True):
    """What one rank sets is sent to all others."""

    key: str
    value: bytes


_entry: Final = msgspec.msgpack.Decoder(Entry)


class RendezvousStore(Store):
    """One rank's end, from when all ranks have met until `close`. It must outlive what uses it: torch keeps the C++
    half of it only.

    A key is set by one rank, once. There is no `add`, which would need an owner.
    """

    def __init__(self, meeting: RendezvousClient) -> None:
        """
        Raises:
            CommunicatorError, FrameError, OSError: as `RendezvousClient.connect`.
        """
        super().__init__()
        self._meeting = meeting
        self._peers = meeting.connect()
        self._framers = {rank: Framer(ENTRY_BYTES + HEADER_BYTES) for rank in self._peers}
        self._entries: dict[str, bytes] = {}

    def close(self) -> None:
        """Nobody hears from this rank any more; what it has set arrives."""
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()

    def set(self, key: str, value: str | bytes) -> None:
        stored = value.encode() if isinstance(value, str) else value
        frame = encode(Entry(key, stored))
        if len(frame) > ENTRY_BYTES:
            raise CommunicatorError(f"a store's entry of {len(frame)} bytes; allowed are {ENTRY_BYTES}")
        self._entries[key] = stored
        for rank, peer in self._peers.items():
            try:
                peer.sendall(frame)
            except OSError as error:
                raise CommunicatorError(f"rank {rank} left before the communicator was made: {error}") from error

    def get(self, key: str) -> bytes:
        """Waits for the key, within the rendezvous' deadline."""
        self.wait([key])
        return self._entries[key]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.wait(keys)
        return [self._entries[key] for key in keys]

    def check(self, keys: list[str]) -> bool:
        return all(key in self._entries for key in keys)

    def wait(self, keys: list[str], timeout: datetime.timedelta | None = None) -> None:
        """
        Raises:
            CommunicatorError: they did not come in time, a rank has left meanwhile, or the meeting was called off.
        """
        deadline = time.monotonic() + timeout.total_seconds() if timeout else None
        while not self.check(keys):
            if not self._peers or (deadline is not None and time.monotonic() > deadline):
                raise CommunicatorError(f"nobody has set {', '.join(keys)}")
            gone = [rank for rank, peer in self._peers.items() if not self._is_there(rank, peer)]
            if gone and not self.check(keys):  # what one has said last may be what is waited for
                raise CommunicatorError(f"rank {gone[0]} left before the communicator was made")
            self._meeting.check()

    def clone(self) -> RendezvousStore:
        return self

    def _is_there(self, rank: int, peer: socket.socket) -> bool:
        """Take what has come; the socket's own time-out is short. False: nothing will come any more."""
        try:
            data = peer.recv(_CHUNK)
            for frame in self._framers[rank].feed(data):
                entry = decode(_entry, frame)
                self._entries[entry.key] = entry.value
        except TimeoutError:
            return True
        except (ConnectionError, FrameError):
            return False
        return bool(data)
