"""The bus: the engine's TCP server for the workers and supervisors of its group.

Nothing that arrives here can end the engine: a peer has a few seconds and a few kilobytes to prove itself, then sends
typed, bounded frames; whatever else it sends closes its own connection and no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Sequence
from typing import Final, Protocol

import msgspec

from lockstep_runtime.protocol.bus import (
    MAX_FRAME_BYTES,
    MAX_HELLO_BYTES,
    PROTOCOL,
    FromSupervisor,
    FromWorker,
    Hello,
    Refused,
    Role,
    Welcome,
)
from lockstep_runtime.protocol.framing import FrameError, Framer, decode, encode, tune
from lockstep_runtime.protocol.tokens import Purpose, entitles

logger = logging.getLogger(__name__)

HELLO_SECONDS: Final = 5.0
ACCEPT_ROUNDS: Final = 10  # of the event loop; a connection that was accepted is made within a few
CLOSE_SECONDS: Final = 1.0  # for what was sent to go out
MAX_UNSENT_BYTES: Final = 256 * 1024 * 1024  # for a peer that does not read

FromPeer = FromWorker | FromSupervisor
_hello_decoder: Final[msgspec.msgpack.Decoder[Hello]] = msgspec.msgpack.Decoder(Hello)
_worker_decoder: Final[msgspec.msgpack.Decoder[FromWorker]] = msgspec.msgpack.Decoder(FromWorker)
_supervisor_decoder: Final[msgspec.msgpack.Decoder[FromSupervisor]] = msgspec.msgpack.Decoder(FromSupervisor)


class Peer(Protocol):
    """One authenticated connection."""

    @property
    def hello(self) -> Hello: ...

    def send(self, message: msgspec.Struct) -> None: ...

    def send_frame(self, frame: bytes) -> None: ...

    def close(self) -> None: ...


class Listener(Protocol):
    """Callbacks of the bus server. Called on the event loop; must not raise."""

    def admit(self, hello: Hello) -> Welcome | Refused: ...

    def connected(self, peer: Peer) -> None: ...

    def received(self, peer: Peer, message: FromPeer) -> None: ...

    def lost(self, peer: Peer) -> None: ...


class BusServer:
    """`token` is the model's; `strangers`: connections that may be there without having proved themselves; `backlog`:
    how many are accepted at once, before any of them is looked at."""

    def __init__(self, token: str, listener: Listener, *, strangers: int = 64, backlog: int = 128) -> None:
        self._most_strangers, self._backlog = strangers, backlog
        self._token = token
        self._listener = listener
        self._strangers: dict[_Connection, None] = {}  # the oldest first
        self._peers: set[_Connection] = set()
        self._servers: list[asyncio.Server] = []

    async def open(self, listening: Sequence[socket.socket]) -> None:
        """Serve on bound sockets."""
        loop = asyncio.get_running_loop()
        for one in listening:
            self._servers.append(await loop.create_server(lambda: _Connection(self), sock=one, backlog=self._backlog))

    async def close(self) -> None:
        """Close every connection, after what was sent has gone out; also one that is just being made."""
        for server in self._servers:
            server.close()
        for _ in range(ACCEPT_ROUNDS):
            await asyncio.sleep(0)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                while connections := {*self._strangers, *self._peers}:
                    for connection in connections:
                        connection.close()
                    await asyncio.sleep(0.001)
        for server in self._servers:
            await server.wait_closed()

    def judge(self, hello: Hello) -> Welcome | Refused:
        """Whether a peer may speak; the token first, so that a stranger learns nothing else."""
        if not entitles(hello.token, self._token, Purpose.BUS):
            return Refused(reason="the token is not this group's")
        if hello.protocol != PROTOCOL:
            return Refused(reason=f"protocol {hello.protocol}; this engine speaks {PROTOCOL}")
        return self._listener.admit(hello)

    def arrived(self, connection: _Connection) -> None:
        """A new connection. Above the limit of those without a Hello, the oldest is closed: members send it at once."""
        if len(self._strangers) >= self._most_strangers:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.abort()
        self._strangers[connection] = None

    def proved(self, connection: _Connection) -> None:
        self._strangers.pop(connection, None)
        self._peers.add(connection)
        self._listener.connected(connection)

    def deliver(self, connection: _Connection, message: FromPeer) -> None:
        self._listener.received(connection, message)

    def ended(self, connection: _Connection) -> None:
        self._strangers.pop(connection, None)
        if connection in self._peers:
            self._peers.discard(connection)
            self._listener.lost(connection)


class _Connection(asyncio.Protocol):
    """One TCP connection; a stranger until its Hello is accepted."""

    def __init__(self, bus: BusServer) -> None:
        self._bus = bus
        self._framer = Framer(MAX_HELLO_BYTES)
        self._hello: Hello | None = None
        self._transport: asyncio.Transport
        self._deadline: asyncio.TimerHandle | None = None

    @property
    def hello(self) -> Hello:
        if self._hello is None:
            raise RuntimeError("this peer has not said Hello")
        return self._hello

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - narrows the type: TCP gives no other
        self._transport = transport
        self._bus.arrived(self)
        tune(transport.get_extra_info("socket"))
        self._deadline = asyncio.get_running_loop().call_later(HELLO_SECONDS, self._too_late)

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._framer.feed(data):
                self._on_frame(frame)
                if self._transport.is_closing():
                    return
        except FrameError as error:
            who = "a stranger" if self._hello is None else _name(self._hello)
            logger.warning("closed the connection of %s: %s", who, error)
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._bus.ended(self)

    def send(self, message: msgspec.Struct) -> None:
        self.send_frame(encode(message))

    def send_frame(self, frame: bytes) -> None:
        """Send an encoded message; a peer that has stopped reading is cut off."""
        if self._transport.is_closing():
            return
        self._transport.write(frame)
        if self._transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self._transport.abort()

    def close(self) -> None:
        self._transport.close()

    def abort(self) -> None:
        self._transport.abort()

    def _on_frame(self, frame: bytes) -> None:
        if self._hello is not None:
            self._bus.deliver(self, self._decode(frame))
            return
        hello = decode(_hello_decoder, frame)
        answer = self._bus.judge(hello)
        self.send(answer)
        if isinstance(answer, Refused):
            logger.warning("refused %s: %s", _name(hello), answer.reason)
            self._transport.close()
            return
        if self._deadline is not None:
            self._deadline.cancel()
        self._hello = hello
        self._framer.limit = MAX_FRAME_BYTES
        self._bus.proved(self)

    def _decode(self, frame: bytes) -> FromPeer:
        if self.hello.role is Role.WORKER:
            return decode(_worker_decoder, frame)
        return decode(_supervisor_decoder, frame)

    def _too_late(self) -> None:
        logger.warning("closed a connection without a Hello for %.0f s", HELLO_SECONDS)
        self._transport.abort()


def _name(hello: Hello) -> str:
    if hello.role is Role.WORKER:
        return f"worker {hello.rank} (pid {hello.pid})"
    return f"the supervisor of pod {hello.pod_index}"
