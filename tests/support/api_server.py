"""The real application on a real uvicorn, with a stand-in for the engine."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

import httpx
import uvicorn
from tests.support.http import async_http

from lockstep_runtime.api.app import create_app
from lockstep_runtime.api.keys import ApiKeys
from lockstep_runtime.api.limits import Limits
from lockstep_runtime.config import EngineLimits, ReasoningParser, ServeConfig, ToolCallParser
from lockstep_runtime.engine.client import EngineClient

TINY_CHAT: Final = Path(__file__).parents[2] / "examples" / "tiny-chat"
SERVED: Final = "org/tiny-chat"


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # pytest keeps its own


@contextlib.asynccontextmanager
async def serving(
    engine: EngineClient,
    *,
    model: Path = TINY_CHAT,
    api_key: str | None = None,
    api_key_file: Path | None = None,
    limits: Limits | None = None,
    engine_limits: EngineLimits | None = None,
    wait_loaded: bool = True,
    cors: tuple[str, ...] = (),
    reasoning_parser: ReasoningParser = "auto",
    tool_call_parser: ToolCallParser = "auto",
) -> AsyncIterator[str]:
    """The server's URL."""
    config = ServeConfig(
        model=str(model),
        served_name=SERVED,
        limits=engine_limits or EngineLimits(),
        cors_allow_origins=cors,
        reasoning_parser=reasoning_parser,
        tool_call_parser=tool_call_parser,
    )
    app = create_app(config, engine, ApiKeys(api_key, api_key_file), limits)
    server = _Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=5))
    # As in the engine process: asyncio sets TCP_NODELAY only on sockets that say TCP.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        running = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            await _started(url, wait_loaded)
            yield url
        finally:
            server.should_exit = True
            await running


async def _started(url: str, loaded: bool) -> None:
    async with asyncio.timeout(30), async_http() as client:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if (await client.get(url + ("/ready" if loaded else "/health"))).status_code == 200:
                    return
            await asyncio.sleep(0.01)
