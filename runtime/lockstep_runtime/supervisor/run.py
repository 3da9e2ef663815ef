"""The supervisor's process: what happens becomes the machine's events, its actions become deeds. PID 1 of a pod."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import signal
import socket
import time
from collections.abc import Coroutine, Sequence
from typing import Any, Final

import msgspec

from lockstep_runtime import child, wire
from lockstep_runtime.config import CONFIG_VARIABLE, TOKEN_VARIABLE, ServeConfig
from lockstep_runtime.supervisor.board import StatusBoard
from lockstep_runtime.supervisor.link import Link
from lockstep_runtime.supervisor.machine import (
    ENGINE,
    Action,
    Finish,
    Machine,
    SayLeaving,
    Signal,
    Spawn,
)
from lockstep_runtime.supervisor.process import Exit, Processes

logger = logging.getLogger(__name__)

PORT_TAKEN_EXIT: Final = 2  # the engine's


class Supervisor:
    """One pod's processes and what they are told."""

    def __init__(self, config: ServeConfig, token: str) -> None:
        self._config, self._token = config, token
        document = msgspec.json.encode(config).decode()
        self._processes = Processes(os.environ | {CONFIG_VARIABLE: document, TOKEN_VARIABLE: token})
        self._machine = Machine(
            ranks=config.ranks,
            is_leader=config.is_leader,
            grace_seconds=config.grace_seconds + (config.lame_duck_seconds if config.is_leader else 0.0),
        )
        self._board = StatusBoard(config) if config.is_leader else None
        incarnation = self._board.incarnation if self._board else f"pod-{config.pod_index}-{os.getpid()}"
        self._link = Link(config, token, incarnation, self._on_message, self._on_lost)
        self._due = asyncio.Event()  # the machine's deadlines may have changed
        self._finished: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def run(self, listening: socket.socket) -> int:
        """Until every child has ended for good; returns the exit code."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGCHLD, self._on_child)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_end_signal, number)
        self._do(self._machine.start(time.monotonic()))
        works: list[Coroutine[Any, Any, None]] = [self._link.run(), self._keep_time(), self._serve(listening)]
        tasks = [loop.create_task(work) for work in works]
        ends: list[asyncio.Future[Any]] = [*tasks, self._finished]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()  # none of them ends by itself, so this raises
            return await self._finished
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, listening: socket.socket) -> None:
        """The HTTP server is imported while the children start."""
        module = await asyncio.to_thread(importlib.import_module, "lockstep_runtime.supervisor.server")
        await module.StatusServer(self._board, self._token, self._config.api_port).run_on(listening)

    async def _keep_time(self) -> None:
        while True:
            self._due.clear()
            deadline = self._machine.next_deadline()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if deadline is None else max(0.0, deadline - time.monotonic())):
                    await self._due.wait()
            self._do(self._machine.tick(time.monotonic()))

    # --- what happens

    def _on_child(self) -> None:
        for gone in self._processes.reap():
            self._on_exit(gone)

    def _on_exit(self, gone: Exit) -> None:
        how = f"was killed by signal {gone.signal}" if gone.code is None else f"ended with exit code {gone.code}"
        who = "the engine" if gone.name == ENGINE else f"worker {gone.name}"
        logger.info("%s (pid %d) %s", who, gone.pid, how)
        if gone.name != ENGINE:
            self._link.send(
                wire.ProcessExited(
                    rank=gone.name,
                    pid=gone.pid,
                    incarnation=gone.incarnation,
                    exit_code=gone.code,
                    signal=gone.signal,
                )
            )
        elif self._board is not None:
            self._board.engine_lost(how)
        hopeless = gone.name == ENGINE and gone.code == PORT_TAKEN_EXIT
        self._do(self._machine.exited(gone.name, healthy=gone.healthy, now=time.monotonic(), hopeless=hopeless))

    def _on_end_signal(self, number: int) -> None:
        logger.info("asked to end by %s", signal.Signals(number).name)
        self._do(self._machine.asked_to_end(time.monotonic(), connected=self._link.connected))

    def _on_message(self, message: wire.ToSupervisor) -> None:
        match message:
            case wire.StatusReport() if self._board is not None:
                self._board.take(message.status)
            case wire.KillWorker():
                if self._processes.incarnation(message.rank) == message.incarnation:
                    self._do(self._machine.kill(message.rank, message.reason))
            case wire.Release():
                self._do(self._machine.released(time.monotonic()))
            case _:
                pass

    def _on_lost(self) -> None:
        self._do(self._machine.disconnected(time.monotonic()))

    # --- what is done

    def _do(self, actions: Sequence[Action]) -> None:
        for action in actions:
            self._act(action)
        self._due.set()

    def _act(self, action: Action) -> None:
        match action:
            case Spawn():
                pid = self._processes.spawn(action.name, self._history() if action.name == ENGINE else None)
                logger.debug("started %s (pid %d)", action.name, pid)
            case Signal():
                level = logging.WARNING if action.number == signal.SIGKILL else logging.DEBUG
                logger.log(level, "%s to %s: %s", signal.Signals(action.number).name, action.name, action.reason)
                self._processes.signal(action.name, action.number)
            case SayLeaving():
                self._link.send(wire.Leaving(grace_seconds=action.grace_seconds))
            case Finish():
                logger.info("ends: %s", action.reason)
                if not self._finished.done():
                    self._finished.set_result(action.code)

    def _history(self) -> dict[str, str]:
        """What the engine before said last, so that fault ids, epochs and counts go on."""
        last = self._board.from_engine if self._board is not None else None
        return {child.HISTORY_VARIABLE: msgspec.json.encode(last).decode()} if last is not None else {}
