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
from pathlib import Path
from typing import Any

import msgspec

from lockstep_runtime.chaos import pending
from lockstep_runtime.config import CONFIG_VARIABLE, OPERATOR_TOKEN_FILE_VARIABLE, TOKEN_VARIABLE, ServeConfig
from lockstep_runtime.host import discovery, process_init, shm_files
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.chaos import Inject
from lockstep_runtime.protocol.status import PodProblemReason
from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.sources.fetch_order import FetchOrder
from lockstep_runtime.sources.model_folder import is_hub_model
from lockstep_runtime.sources.tokens import given_token, without_tokens
from lockstep_runtime.supervisor import stall_tracker
from lockstep_runtime.supervisor.bus_client import BusClient
from lockstep_runtime.supervisor.callers import Callers
from lockstep_runtime.supervisor.exits import Exit, Stop
from lockstep_runtime.supervisor.member_readiness import MemberReadiness
from lockstep_runtime.supervisor.oom import OutOfMemory
from lockstep_runtime.supervisor.problems import Problems
from lockstep_runtime.supervisor.process import ForkError, Processes
from lockstep_runtime.supervisor.state_machine import (
    ENGINE,
    FETCHER,
    ZYGOTE,
    Action,
    Finish,
    Machine,
    Name,
    NotifyLeaving,
    SayStopped,
    Signal,
    Spawn,
)
from lockstep_runtime.supervisor.status_store import StatusStore

logger = logging.getLogger(__name__)


class Supervisor:
    """Connects the state machine with one pod's processes, the engine and the status server."""

    def __init__(self, config: ServeConfig, token: str) -> None:
        self._config, self._token = config, token
        document = msgspec.json.encode(config).decode()
        environment = without_tokens(config.source, os.environ)
        self._processes = Processes(environment | {CONFIG_VARIABLE: document, TOKEN_VARIABLE: token})
        self._commit = config.model_commit or ""  # of the hub's model, that the group has agreed on
        self._machine = Machine(
            fetches=_is_of_a_hub(config.model),
            may_fetch=config.is_leader or bool(self._commit),
            ranks=config.ranks,
            is_leader=config.is_leader,
            grace_seconds=config.grace_seconds + config.lame_duck_seconds,
        )
        self._board = StatusStore(config) if config.is_leader else None
        self._readiness = MemberReadiness()  # of a member pod
        incarnation = self._board.incarnation if self._board else f"pod-{config.pod_index}-{os.getpid()}"
        self._link = BusClient(config, token, incarnation, self._on_message, self._on_lost, self._tell_problems)
        self._out_of_memory = OutOfMemory()
        self._problems = Problems(config.pod_index)
        self._starts: set[asyncio.Task[None]] = set()  # of processes
        self._claims: list[int] = []
        self._due = asyncio.Event()  # the machine's deadlines may have changed
        self._finished: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def run(self, listening: Sequence[socket.socket]) -> int:
        """Run until no child is left or will be started; returns the exit code."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGCHLD, self._on_child)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_end_signal, number)
        self._lay_out_files()
        self._do(self._machine.start(time.monotonic()))
        works: list[Coroutine[Any, Any, None]] = [
            self._link.run(), self._keep_time(), self._watch_records(), self._serve(listening),
        ]  # fmt: skip
        tasks = [loop.create_task(work) for work in works]
        ends: list[asyncio.Future[Any]] = [*tasks, self._finished]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()  # none of them ends by itself, so this raises
            return await self._finished
        finally:
            for task in (*tasks, *self._starts):
                task.cancel()
            await asyncio.gather(*tasks, *self._starts, return_exceptions=True)
            await self._processes.end_orphans()
            for one in listening:
                one.close()
            shm_files.remove(os.environ)
            for claim in self._claims:
                os.close(claim)
            discovery.forget(os.getpid())

    def _lay_out_files(self) -> None:
        """What supervisors that were killed left behind goes; a fault on purpose waits for its rank."""
        shm_files.remove(os.environ)
        self._claims = shm_files.claim(os.environ)
        if self._config.allow_faults and (once := os.environ.get(pending.ONCE_VARIABLE)):
            fault = pending.parse_once(once)
            if fault.rank in self._config.ranks:
                pending.leave(os.environ, fault)

    async def _serve(self, listening: Sequence[socket.socket]) -> None:
        """The HTTP server is imported while the children start."""
        module = await asyncio.to_thread(importlib.import_module, "lockstep_runtime.supervisor.server")
        inject = self._inject if self._config.allow_faults and self._config.is_leader else None
        readiness = self._board or self._readiness
        file = os.environ.get(OPERATOR_TOKEN_FILE_VARIABLE)
        callers = Callers(self._token, Path(file) if file else None)
        await module.StatusServer(readiness, callers, inject, self._config).run_on(listening)

    async def _keep_time(self) -> None:
        while True:
            self._due.clear()
            deadline = self._machine.next_deadline()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if deadline is None else max(0.0, deadline - time.monotonic())):
                    await self._due.wait()
            self._do(self._machine.tick(time.monotonic()))

    async def _watch_records(self) -> None:
        while True:
            self._processes.look_at_records()
            if self._board is not None:
                self._board.check(time.monotonic())
            if self._problems.forget_old(time.time()):
                self._tell_problems()
            await asyncio.sleep(stall_tracker.LOOK_SECONDS)

    # --- what happens

    def _on_child(self) -> None:
        try:
            self._reap()
        except Exception as error:
            self._fail(error)
        self._due.set()

    def _reap(self) -> None:
        for news in self._processes.reap():
            if isinstance(news, Exit):
                self._on_exit(news)
            elif not isinstance(news, Stop):
                if oom := self._out_of_memory.explain(news.signal):
                    self._complain(PodProblemReason.OUT_OF_MEMORY, f"a zygote of this pod was {oom}")
            elif news.signal:
                logger.warning("%s was stopped by %s", news.name, signal.Signals(news.signal).name)
                self._machine.stopped(news.name, news.signal, time.monotonic())
            else:
                self._machine.continued(news.name)

    def _on_exit(self, gone: Exit) -> None:
        oom = self._out_of_memory.explain(gone.signal, gone.used)
        how = exit_text(gone, oom)
        who = f"rank {gone.name}" if isinstance(gone.name, int) else f"the {gone.name}"
        logger.info("%s (pid %d) %s", who, gone.pid, how)
        if oom:
            self._complain(PodProblemReason.OUT_OF_MEMORY, f"{who} was {oom}")
        if isinstance(gone.name, int):
            self._link.send(
                bus.ProcessExited(
                    rank=gone.name,
                    pid=gone.pid,
                    incarnation=gone.incarnation,
                    exit_code=gone.code,
                    signal=gone.signal,
                    oom=oom,
                )
            )
        elif gone.name == ZYGOTE:
            self._processes.zygotes.dismiss()
        slowly = isinstance(gone.name, int) and gone.code == process_init.CANT_LOAD_EXIT
        now = time.monotonic()
        if gone.name == FETCHER and gone.code == 0:
            self._do(self._machine.fetched(now))
            return
        self._do(self._machine.exited(gone.name, healthy=gone.healthy, now=now, slowly=slowly))
        if isinstance(gone.name, int) and gone.code in (process_init.LOAD_FAILED_EXIT, process_init.CANT_LOAD_EXIT):
            self._do(self._machine.fetch(now))  # the files may not be what they were
        if gone.name == ENGINE and self._board is not None:
            self._board.engine_lost(how, self._machine.failures(ENGINE))

    def _on_end_signal(self, number: int) -> None:
        logger.info("asked to end by %s", signal.Signals(number).name)
        self._do(self._machine.asked_to_end(time.monotonic(), connected=self._link.connected))

    def _on_message(self, message: bus.ToSupervisor) -> None:
        match message:
            case bus.StatusReport() if self._board is not None:
                self._board.take(message.status)
                self._machine.heard(time.monotonic())
            case bus.GroupReadiness():
                self._readiness.take(message, time.monotonic())
            case bus.KillWorker():
                if self._processes.incarnation(message.rank) == message.incarnation:
                    self._do(self._machine.kill(message.rank, message.reason))  # first: it must not join once more
                    if message.reload:
                        self._processes.zygotes.end_loaded(message.rank)
            case bus.ReadProgress():
                self._link.send(bus.ProgressReport(asked=message.asked, records=self._processes.records()))
            case Inject():
                if self._config.allow_faults and not pending.leave(os.environ, message):
                    logger.warning("%s on rank %d is left out: enough faults wait for it", message.kind, message.rank)
            case bus.ModelCommit():
                self._on_commit(message.commit)
            case bus.Release():
                self._do(self._machine.released(time.monotonic()))
            case _:
                pass

    def _on_commit(self, commit: str) -> None:
        """The group has agreed on a commit. Where it is another than before (the leader's pod is new, and the branch
        has moved meanwhile), nothing that was loaded is of use."""
        before, self._commit = self._commit, commit
        if before and before != commit:
            logger.warning("the group loads commit %s now, not %s: the ranks begin anew", commit, before)
            shm_files.fetch_file_of(os.environ, shm_files.owner_of(os.getpid()) or "").unlink(missing_ok=True)
            if FETCHER in self._processes.pids():
                self._processes.signal(FETCHER, signal.SIGKILL)
            for rank in self._config.ranks:
                self._do(self._machine.kill(rank, "the group loads another commit"))
                self._processes.zygotes.end_loaded(rank)
        if before != commit and not (self._config.is_leader and not before):
            self._do(self._machine.fetch(time.monotonic()))

    def _order(self) -> bytes:
        token = given_token(self._config.source, os.environ)
        return msgspec.json.encode(FetchOrder(commit=self._commit, token=token))

    def _inject(self, fault: Inject) -> bool:
        """A fault on purpose: the engine knows whom it concerns."""
        self._link.send(fault)
        return self._link.connected

    def _on_lost(self) -> None:
        self._do(self._machine.disconnected(time.monotonic()))

    # --- what is done

    def _do(self, actions: Sequence[Action]) -> None:
        try:
            for action in actions:
                self._act(action)
        except Exception as error:
            self._fail(error)
        self._due.set()

    def _fail(self, error: Exception) -> None:
        """Of a callback it would only be logged, and the machine believe what is not so."""
        logger.error("the supervisor ends, since it could not do what was due", exc_info=error)
        if not self._finished.done():
            self._finished.set_exception(error)

    def _act(self, action: Action) -> None:
        match action:
            case Spawn():
                self._spawn(action.name)
            case SayStopped():
                self._say_stopped(action)
            case Signal():
                level = logging.WARNING if action.number == signal.SIGKILL else logging.DEBUG
                logger.log(level, "%s to %s: %s", signal.Signals(action.number).name, action.name, action.reason)
                self._processes.signal(action.name, action.number)
            case NotifyLeaving():
                self._link.send(bus.Leaving(grace_seconds=action.grace_seconds))
            case Finish():
                logger.info("ends: %s", action.reason)
                if not self._finished.done():
                    self._finished.set_result(0)

    def _spawn(self, name: Name) -> None:
        if isinstance(name, int):
            self._in_background(self._fork(name))
            return
        try:
            pid = self._processes.spawn(name, self._given(name))
        except OSError as error:
            self._on_spawn_failed(name, f"the {name} can't be started: {error.strerror or error}", zygote_is_lost=False)
            return
        logger.debug("started %s (pid %d)", name, pid)
        if name == ZYGOTE:
            self._in_background(self._await_zygote())

    async def _await_zygote(self) -> None:
        """Of its end its exit tells."""
        if await self._processes.zygotes.wait_until_ready():
            self._do(self._machine.zygote_ready(time.monotonic()))

    async def _fork(self, rank: int) -> None:
        try:
            pid = await self._processes.fork(rank)
            logger.debug("started rank %d (pid %d)", rank, pid)
        except ForkError as error:
            self._on_spawn_failed(rank, str(error), zygote_is_lost=error.zygote_is_lost)
        self._on_child()  # what has ended meanwhile may have been this one

    def _in_background(self, start: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(start)
        self._starts.add(task)
        task.add_done_callback(self._on_started)

    def _on_started(self, task: asyncio.Task[None]) -> None:
        self._starts.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._fail(error)

    def _on_spawn_failed(self, name: Name, reason: str, *, zygote_is_lost: bool) -> None:
        logger.warning("%s", reason)
        if not zygote_is_lost:
            self._complain(PodProblemReason.SPAWN_FAILED, f"pod {self._config.pod_index}: {reason}")
        self._do(self._machine.spawn_failed(name, reason, time.monotonic(), zygote_is_lost=zygote_is_lost))
        if name == ENGINE and self._board is not None:
            self._board.engine_lost(f"can't be started ({reason})", self._machine.failures(ENGINE))

    def _complain(self, reason: PodProblemReason, message: str) -> None:
        self._problems.add(reason, message, time.time())
        self._tell_problems()

    def _tell_problems(self) -> None:
        """To the group's status, by the engine, and in the leader's own while there is none."""
        self._link.send(bus.PodReport(problems=self._problems.all()))
        if self._board is not None:
            self._board.complain(self._problems.all())

    def _say_stopped(self, action: SayStopped) -> None:
        pid, incarnation = self._processes.pids()[action.rank], self._processes.incarnation(action.rank)
        message = bus.ProcessStopped(rank=action.rank, pid=pid, incarnation=incarnation, signal=action.number)
        self._link.send(message)

    def _given(self, name: Name) -> bytes:
        match name:
            case "engine":
                return self._history()
            case "fetcher":
                return self._order()
            case _:
                return b""

    def _history(self) -> bytes:
        """The last status of the previous engine, so that fault ids, epochs and counts continue."""
        last = self._board.from_engine if self._board is not None else None
        return msgspec.json.encode(last) if last is not None else b""


def _is_of_a_hub(model: str) -> bool:
    """A folder that can't be read is the ranks' to report."""
    try:
        return is_hub_model(model)
    except ModelError:
        return False


def exit_text(gone: Exit, oom: str) -> str:
    if oom:
        return f"was {oom}"
    if gone.code is None:
        return f"was killed by signal {gone.signal}"
    return f"ended with exit code {gone.code}{f' ({gone.message})' if gone.message else ''}"
