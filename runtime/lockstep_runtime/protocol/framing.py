"""Frames on a TCP connection, what both ends of the bus share: 4 bytes of big-endian length and so many bytes.

asyncio's `readexactly` would do for the engine and the supervisor; the worker's end is a thread with a plain socket.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Final, TypeVar

import msgspec

from lockstep_runtime.protocol import bus

HEADER_BYTES: Final = 4
_encoder: Final = msgspec.msgpack.Encoder()
_M = TypeVar("_M")


class FrameError(ValueError):
    """A peer sent what no peer of ours sends: too long, empty, or not one of the messages that may come."""


def encode(message: msgspec.Struct) -> bytes:
    """One frame, header included."""
    body = _encoder.encode(message)
    if len(body) > bus.MAX_FRAME_BYTES:
        raise FrameError(f"a {type(message).__name__} of {len(body)} bytes is above {bus.MAX_FRAME_BYTES}")
    return len(body).to_bytes(HEADER_BYTES, "big") + body


def decode(decoder: msgspec.msgpack.Decoder[_M], frame: bytes) -> _M:
    """The message in one frame's body.

    Raises:
        FrameError: it is not one of the decoder's types, or nested too deeply.
    """
    try:
        return decoder.decode(frame)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise FrameError(f"not a message that is expected here: {error}") from error


class Framer:
    """Cuts a stream of bytes into frames. `limit` may be raised once the peer has proved itself."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The bodies of the frames that are complete now.

        Raises:
            FrameError: a frame is empty or longer than the limit (noticed from its header alone).
        """
        self._buffer += data
        while len(self._buffer) >= HEADER_BYTES:
            length = int.from_bytes(self._buffer[:HEADER_BYTES], "big")
            if not 0 < length <= self.limit:
                raise FrameError(f"a frame of {length} bytes; allowed are 1 to {self.limit}")
            end = HEADER_BYTES + length
            if len(self._buffer) < end:
                return
            frame = bytes(self._buffer[HEADER_BYTES:end])
            del self._buffer[:end]
            yield frame


def tune(connection: socket.socket) -> None:
    """No Nagle delay, and a peer whose machine vanished is noticed within about 15 s."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 5)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 15_000)
