"""The worker's end of the bus: a thread that owns the socket and stays responsive while the main thread computes.

It connects for as long as the process lives, again whenever the connection is lost (weights are kept, the communicator
is not), and hands commands to the main thread in order. `Abort` acts at once, from this thread, and is handed on too.
"""

from __future__ import annotations

import logging
import queue
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec

from lockstep_runtime.config import ServeConfig, bus_address, hello
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.chaos import Inject
from lockstep_runtime.protocol.framing import FrameError, Framer, decode, encode, tune
from lockstep_runtime.protocol.reconnect import CONNECT_SECONDS, Pauses

logger = logging.getLogger(__name__)

_decoder: Final = msgspec.msgpack.Decoder(bus.ToWorker)


@dataclass(frozen=True, slots=True)
class Connected:
    """The engine has admitted this process (again), and needs its state."""

    connection: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Disconnected:
    """Whatever was under way is void."""


@dataclass(frozen=True, slots=True)
class ShutdownRequested:
    """The process must end, for this reason."""

    reason: str


Command = (
    Connected | Disconnected | ShutdownRequested
    | bus.Rendezvous | bus.Join | bus.AllocateCache | bus.ImagePart | bus.Step | bus.Scrub | bus.Abort | Inject
)  # fmt: skip


class BusClient:
    """`interrupt` is called from the control thread: it must make a blocked collective raise, and return at once."""

    def __init__(self, config: ServeConfig, rank: int, token: str, incarnation: str) -> None:
        self._config, self._rank, self._token, self._incarnation = config, rank, token, incarnation
        self.inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self.min_epoch = 0  # commands of epochs below this are void
        self.interrupt: Callable[[], None] = lambda: None
        self.on_inject: Callable[[Inject], None] | None = None  # a fault on purpose; None: none are taken
        self.resolving = threading.Lock()  # held while the engine's name is looked up: a fork would copy locks of C's
        self._socket: socket.socket | None = None
        self._connections = 0
        self._send_lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Close the connection and make no other."""
        self._stopped.set()
        self.disconnect()
        self._thread.join()

    def send(self, message: bus.FromWorker) -> None:
        """Send, or drop without a connection: the engine repeats its requests after it reconnects."""
        frame = encode(message)
        with self._send_lock:
            if self._socket is None:
                return
            try:
                self._socket.sendall(frame)
            except OSError as error:
                logger.info("could not send %s: %s", type(message).__name__, error)

    def disconnect(self) -> None:
        """Cut the connection, as a network may; another is made."""
        with self._send_lock:
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)

    @property
    def connected(self) -> bool:
        return self._socket is not None

    def is_current(self, command: Connected) -> bool:
        return command.connection == self._connections and self._socket is not None

    def _run(self) -> None:
        pauses = Pauses()
        while not self._stopped.is_set():
            try:
                self._one_connection()
                pauses.start_over()
            except (OSError, FrameError) as error:
                logger.log(logging.INFO if self._socket else logging.DEBUG, "connection to the engine: %s", error)
            if self._socket is not None:
                self._lose()
                pauses.start_over()
            self._stopped.wait(pauses.next())

    def _lose(self) -> None:
        with self._send_lock:
            if self._socket is not None:
                self._socket.close()
            self._socket = None
        self.inbox.put(Disconnected())
        self.interrupt()

    def _one_connection(self) -> None:
        """Until the engine closes it. Returns or raises OSError or FrameError."""
        with self.resolving:
            connection = socket.create_connection(bus_address(self._config), timeout=CONNECT_SECONDS)
        try:
            tune(connection)
            connection.sendall(encode(self._hello()))
            framer = Framer(bus.MAX_FRAME_BYTES)
            while data := connection.recv(1 << 16):
                connection.settimeout(None)
                for frame in framer.feed(data):
                    self._receive(connection, decode(_decoder, frame))
        finally:
            if self._socket is not connection:
                connection.close()

    def _receive(self, connection: socket.socket, message: bus.ToWorker) -> None:
        match message:
            case bus.Welcome():
                with self._send_lock:
                    self._socket = connection
                    self._connections += 1
                self.min_epoch = max(self.min_epoch, message.epoch)
                self.inbox.put(Connected(self._connections, message.epoch))
            case bus.Refused():
                logger.error("the engine refused this worker: %s", message.reason)
                self.inbox.put(ShutdownRequested(message.reason))
            case bus.Abort():
                self.min_epoch = max(self.min_epoch, message.epoch)
                self.inbox.put(message)
                self.interrupt()
            case Inject():
                if self.on_inject is not None:
                    self.on_inject(message)
                    self.inbox.put(message)  # which wakes the main thread: it is idle
            case _:
                self.inbox.put(message)

    def _hello(self) -> bus.Hello:
        made = hello(self._config, self._token, bus.Role.WORKER, self._incarnation)
        return msgspec.structs.replace(made, epoch=self.min_epoch, rank=self._rank)
