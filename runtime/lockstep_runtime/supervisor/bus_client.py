"""The supervisor's connection to the engine's bus: kept up for ever, in the leader pod as in every other."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

import msgspec

from lockstep_runtime.config import ServeConfig, bus_address, hello
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.framing import FrameError, Framer, decode, encode, tune
from lockstep_runtime.protocol.reconnect import CONNECT_SECONDS, Pauses

logger = logging.getLogger(__name__)

_decoder: Final = msgspec.msgpack.Decoder(bus.ToSupervisor)


class BusClient:
    """`on_message`, `on_lost` and `on_welcome` are called on the event loop."""

    def __init__(
        self,
        config: ServeConfig,
        token: str,
        incarnation: str,
        on_message: Callable[[bus.ToSupervisor], None],
        on_lost: Callable[[], None],
        on_welcome: Callable[[], None] = lambda: None,
    ) -> None:
        self._config, self._token, self._incarnation = config, token, incarnation
        self._on_message, self._on_lost, self._on_welcome = on_message, on_lost, on_welcome
        self._writer: asyncio.StreamWriter | None = None
        self._welcome = False

    @property
    def connected(self) -> bool:
        return self._writer is not None and self._welcome

    def send(self, message: bus.FromSupervisor) -> None:
        """Send, or drop while there is no engine: a new engine starts from what it sees."""
        if self._writer is not None and self._welcome:
            self._writer.write(encode(message))

    async def run(self) -> None:
        """Until cancelled."""
        pauses = Pauses()
        while True:
            try:
                await self._one_connection()
            except (OSError, FrameError, TimeoutError) as error:
                logger.debug("connection to the engine: %s", error)
            if self._welcome:
                self._welcome = False
                pauses.start_over()
                self._on_lost()
            await asyncio.sleep(pauses.next())

    async def _one_connection(self) -> None:
        host, port = bus_address(self._config)
        async with asyncio.timeout(CONNECT_SECONDS):
            reader, writer = await asyncio.open_connection(host, port)
        try:
            tune(writer.get_extra_info("socket"))
            writer.write(encode(hello(self._config, self._token, bus.Role.SUPERVISOR, self._incarnation)))
            self._writer = writer
            framer = Framer(bus.MAX_FRAME_BYTES)
            while data := await reader.read(1 << 16):
                for frame in framer.feed(data):
                    self._receive(decode(_decoder, frame))
        finally:
            self._writer = None
            writer.close()

    def _receive(self, message: bus.ToSupervisor) -> None:
        match message:
            case bus.Welcome():
                self._welcome = True
                self._on_welcome()
            case bus.Refused():
                logger.error("the engine refused this pod: %s", message.reason)
            case _:
                self._on_message(message)
