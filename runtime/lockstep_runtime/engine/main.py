"""Starts and ends the engine process: the bus first, so that workers can report while the rest is still imported."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from lockstep_runtime.config import (
    API_KEY_FILE_VARIABLE,
    API_KEY_VARIABLE,
    CONFIG_VARIABLE,
    TOKEN_VARIABLE,
    ServeConfig,
)
from lockstep_runtime.engine.engine import Engine
from lockstep_runtime.host import descriptors, process_init
from lockstep_runtime.host.addresses import listen
from lockstep_runtime.protocol.status import GroupStatus
from lockstep_runtime.recovery.bus_server import BusServer
from lockstep_runtime.sources.errors import ModelError, may_pass
from lockstep_runtime.sources.files import read_object
from lockstep_runtime.sources.model_config import max_length
from lockstep_runtime.sources.model_folder import (
    POLL_SECONDS,
    StillFetchingError,
    commit_of,
    locate,
    read_config,
)
from lockstep_runtime.tracing import exporter

if TYPE_CHECKING:
    import uvicorn

    from lockstep_runtime.tracing.traces import Traces

logger = logging.getLogger(__name__)

MODEL_RETRY_SECONDS: Final = (1.0, 2.0, 4.0, 8.0, 15.0)
RELEASE_SECONDS: Final = 0.2  # for the last messages to go out


def main() -> None:
    """Serve until SIGTERM, then drain and exit 0; any other end is reported to the supervisor, with exit code 1."""
    try:
        config = msgspec.json.decode(os.environ[CONFIG_VARIABLE], type=ServeConfig)
        process_init.become("engine", f"engine model={config.model_name} group={config.group}")
        bus_sockets = listen(config.host, config.bus_port)
        api_sockets = listen(config.host, config.api_port)
        asyncio.run(_serve(config, bus_sockets, api_sockets))
    except Exception as error:
        process_init.write_termination_message(error)
        raise


async def _serve(config: ServeConfig, bus_sockets: list[socket.socket], api_sockets: list[socket.socket]) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    engine = Engine(config, _history())
    engine.await_api()
    shares = _shares(config)
    bus = BusServer(os.environ[TOKEN_VARIABLE], engine.group, strangers=shares.strangers, backlog=shares.backlog)
    await bus.open(bus_sockets)
    async with tracing(config, engine) as traces, asyncio.TaskGroup() as tasks:
        running = [
            tasks.create_task(engine.run()),
            tasks.create_task(engine.report()),
            tasks.create_task(read_model(config, engine)),
            *([tasks.create_task(traces.run())] if traces else []),
        ]
        server = await _api_server(config, engine, traces)
        api = tasks.create_task(server.serve(sockets=api_sockets))
        await _stopped(stop, api)
        logger.info("asked to end: draining")
        await engine.drain()
        server.should_exit = True
        await api
        engine.release()
        await asyncio.sleep(RELEASE_SECONDS)
        for task in running:
            task.cancel()
    await bus.close()
    logger.info("ended")


@contextlib.asynccontextmanager
async def tracing(config: ServeConfig, engine: Engine) -> AsyncIterator[Traces | None]:
    """None: the environment names no collector. Otherwise what is left is sent at the end."""
    if not exporter.wanted(os.environ):
        yield None
        return
    place = {"k8s.pod.name": config.pod, "k8s.node.name": config.node}
    attributes = {**place, "lockstep.model": config.model_name, "lockstep.group": str(config.group)}
    provider = await asyncio.to_thread(exporter.provider, os.environ, attributes)
    if provider is None:
        yield None
        return
    module = await asyncio.to_thread(importlib.import_module, "lockstep_runtime.tracing.traces")
    traces: Traces = module.Traces(provider, config.model_name, config.group, lambda: engine.group.faults.records)
    try:
        yield traces
    finally:
        traces.close()
        await exporter.flush(provider)


def _shares(config: ServeConfig) -> descriptors.Shares:
    return descriptors.shares(descriptors.limit(), peers=config.tensor_parallel_size + config.pods)


def _history() -> GroupStatus | None:
    """The last status of the previous engine; fault ids and epochs continue from it."""
    if os.environ.get(process_init.HISTORY_VARIABLE) != "stdin":
        return None
    return msgspec.json.decode(sys.stdin.buffer.read(), type=GroupStatus)


async def _stopped(stop: asyncio.Event, api: asyncio.Task[None]) -> None:
    asked = asyncio.create_task(stop.wait())
    await asyncio.wait([asked, api], return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    if api.done():
        raise RuntimeError("the HTTP server ended by itself")


async def read_model(config: ServeConfig, engine: Engine) -> None:
    """Read the model's configuration, retrying until it succeeds."""
    attempt = 0
    while True:
        try:
            length = await asyncio.to_thread(_model_length, config)
            engine.set_commit(commit_of(config))
            engine.set_model(length)
            return
        except StillFetchingError:
            engine.set_commit(commit_of(config))
            await asyncio.sleep(POLL_SECONDS)
            continue
        except Exception as error:  # whatever is in the files: the engine goes on, and says so
            words = str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {error}"
            engine.set_model_error(words, may_pass=may_pass(error))
            retry_after = error.retry_after if isinstance(error, ModelError) else 0.0
        await asyncio.sleep(max(retry_after, MODEL_RETRY_SECONDS[min(attempt, len(MODEL_RETRY_SECONDS) - 1)]))
        attempt += 1


def _model_length(config: ServeConfig) -> int | None:
    folder = locate(config)
    return max_length(read_config(folder), read_object(folder / "tokenizer_config.json") or {})


async def _api_server(config: ServeConfig, engine: Engine, traces: Traces | None) -> uvicorn.Server:
    """The API's imports take a second; the bus is served meanwhile."""
    uvicorn_module = await asyncio.to_thread(importlib.import_module, "uvicorn")
    app_module = await asyncio.to_thread(importlib.import_module, "lockstep_runtime.api.app")
    keys_module = importlib.import_module("lockstep_runtime.api.keys")
    file = os.environ.get(API_KEY_FILE_VARIABLE)
    keys = keys_module.ApiKeys(os.environ.get(API_KEY_VARIABLE), Path(file) if file else None)
    app = app_module.create_app(config, engine, keys, traces=traces)
    connections = await asyncio.to_thread(importlib.import_module, "lockstep_runtime.host.connections")
    shares = _shares(config)
    settings = uvicorn_module.Config(
        app, log_config=None, access_log=False, lifespan="on", timeout_keep_alive=75,
        http=connections.limited(shares.clients), backlog=shares.backlog,
    )  # fmt: skip

    class Server(uvicorn_module.Server):  # type: ignore[misc, name-defined] # imported late, on purpose
        """SIGTERM is ours: it starts the drain."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    server: uvicorn.Server = Server(settings)
    return server
