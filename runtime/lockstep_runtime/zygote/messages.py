"""What the supervisor and a zygote send each other: one packet (SOCK_SEQPACKET) each, JSON, files as descriptors.

    zygote      Ready                             once, when it can fork
    supervisor  ForkRequest, with descriptors     at most one that has no reply yet
    zygote      Forked or ForkFailed              in reply

A child that was forked waits for a byte on `ForkRequest.start` before it does anything. So one of which the supervisor
did not learn in time never becomes the rank: the pipe is closed, and the child exits.
"""

from __future__ import annotations

import socket
from typing import Final, Protocol

import msgspec

MAX_BYTES: Final = 4096  # of one message
MAX_ERROR_CHARACTERS: Final = 400  # of ForkFailed
_MAX_FILES: Final = 4


class ZygoteGoneError(OSError):
    """The other end of the socket is closed."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The zygote can fork. A loaded zygote sends a pidfd of itself along."""


class ForkRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Requests a process for this rank, with its parameters. The numbers of descriptors are whoever's has the object.

    Args:
        start: the read end of a pipe; the child waits for a byte of it.
        progress: memory of its progress record.
        cache: memory of its KV cache.
        zygote: a socket on which the zygote that the child leaves once it has loaded takes requests, if it may.
    """

    rank: int
    incarnation: str
    progress: int
    cache: int
    zygote: int | None = None
    start: int | None = None

    def files(self) -> dict[str, int]:
        """The descriptors, by name, in their order on the socket."""
        named = {"start": self.start, "progress": self.progress, "cache": self.cache, "zygote": self.zygote}
        return {name: descriptor for name, descriptor in named.items() if descriptor is not None}


class Forked(msgspec.Struct, frozen=True, tag=True):
    pid: int


class ForkFailed(msgspec.Struct, frozen=True, tag=True):
    """The kernel refused; the zygote can be asked again."""

    message: str


class Entrypoint(Protocol):
    """What the children of a zygote do: the worker's, handed in."""

    def prepare(self) -> None:
        """In a process that was forked ahead: whatever it would otherwise do when it is needed."""

    def run(self, request: ForkRequest) -> None:
        """In a child that has been started. The process ends when it returns."""


def send_request(requests: socket.socket, request: ForkRequest) -> None:
    """Send it; the descriptors stay open here.

    Raises:
        OSError: nobody reads it.
    """
    socket.send_fds(requests, [msgspec.json.encode(request)], list(request.files().values()))


def receive_request(requests: socket.socket) -> ForkRequest:
    """Wait for the next one.

    Raises:
        ZygoteGoneError: nobody can send any more.
    """
    data, descriptors, _, _ = socket.recv_fds(requests, MAX_BYTES, _MAX_FILES, socket.MSG_CMSG_CLOEXEC)
    if not data:
        raise ZygoteGoneError("the supervisor closed the socket")
    request = msgspec.json.decode(data, type=ForkRequest)
    return msgspec.structs.replace(request, **dict(zip(request.files(), descriptors, strict=True)))


def send_ready(requests: socket.socket, pidfd: int | None = None) -> None:
    """Say that `requests` are read from now on."""
    socket.send_fds(requests, [msgspec.json.encode(Ready())], [] if pidfd is None else [pidfd])


def receive_ready(replies: socket.socket) -> list[int]:
    """The pidfd that came with it, if one did; at once if `replies` doesn't block.

    Raises:
        BlockingIOError: the zygote isn't ready yet.
        ZygoteGoneError: it never will be.
    """
    data, pidfds, _, _ = socket.recv_fds(replies, MAX_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
    if not data:
        raise ZygoteGoneError("it has ended")
    msgspec.json.decode(data, type=Ready)
    return pidfds


def encode_reply(reply: Forked | ForkFailed) -> bytes:
    return msgspec.json.encode(reply)


def decode_reply(data: bytes) -> Forked | ForkFailed:
    return _reply_decoder.decode(data)


_reply_decoder: Final[msgspec.json.Decoder[Forked | ForkFailed]] = msgspec.json.Decoder(Forked | ForkFailed)
