"""`lockstep-operator`: everything put together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import secrets
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import kopf
from aiohttp import web

from lockstep_operator import handlers, server, tracing
from lockstep_operator import log as logs
from lockstep_operator.cluster import operator_key, served_schema
from lockstep_operator.cluster.census import Census
from lockstep_operator.cluster.client import ApiServer, KubeError, connect
from lockstep_operator.cluster.election import Candidate
from lockstep_operator.cluster.indexes import Indexes
from lockstep_operator.cluster.namespaces import Namespaces
from lockstep_operator.cluster.node_conditions import NodeConditions
from lockstep_operator.cluster.served_schema import ServedSchema
from lockstep_operator.controller import Controller
from lockstep_operator.groups.status_poller import StatusPoller
from lockstep_operator.leadership import Leadership
from lockstep_operator.live import site
from lockstep_operator.live.board import Board
from lockstep_operator.live.passing_on import Leader
from lockstep_operator.reconcile import ReconcileOutcome, Reconciler, Tell, unheard
from lockstep_operator.reporting.metrics import Metrics
from lockstep_operator.settings import Settings, read_settings
from lockstep_operator.types.names import KIND, ModelKey
from lockstep_operator.types.operator_key import OperatorKey
from lockstep_operator.workqueue import WorkQueue
from lockstep_runtime.protocol.status import GroupStatus

log = logging.getLogger("lockstep_operator")

SCHEMA_RETRY_SECONDS: Final = 2.0


def main() -> None:
    settings = read_settings(sys.argv[1:])
    logs.configure(settings.log_level, settings.log_format)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each group's report is a connection
    # A container that is started again is its pod's only one; processes of one machine aren't alone.
    identity = os.environ.get("POD_ID") or f"{socket.gethostname()}_{secrets.token_hex(4)}"
    os.environ.setdefault("POD_ID", identity)  # else kopf asks for the user's name, which may have none
    with contextlib.suppress(asyncio.CancelledError):  # by a signal
        asyncio.run(run(settings, identity))


async def run(settings: Settings, identity: str) -> None:
    """Until a signal ends it (kopf takes SIGTERM and SIGINT while it watches) or a part of it fails."""
    metrics, schema, watching = Metrics(), ServedSchema(), asyncio.Event()
    api_client = await connect()
    leadership = None
    if settings.lease and settings.operator_namespace:
        candidate = Candidate(settings.operator_namespace, settings.lease, identity, page=settings.live_url)
        leadership = Leadership(candidate)

    def unready() -> str:
        if leadership and not leadership.leads():
            return leadership.problem
        return schema.problem if watching.is_set() else "models aren't watched yet"

    board, traces = Board(), await tracing.begun(settings.tracing_endpoint, identity)
    http = await server.serve(server.application(metrics, unready), settings.port)
    live = await _live_page(board, settings, leadership)
    _heed_signals()
    try:
        async with _leading(leadership, metrics):
            kube = ApiServer(api_client, leadership.leads) if leadership else ApiServer(api_client)
            key = await _key(kube, settings)
            namespaces = Namespaces(settings.namespaces, kube, metrics)
            work = Work(settings, kube, key, schema, metrics, namespaces, board, traces.tell)
            while await _watch(work, watching):
                log.info("other namespaces are to be watched")
    finally:
        await api_client.close()
        await http.cleanup()
        if live:
            await live.cleanup()
        await traces.close()


async def _key(kube: ApiServer, settings: Settings) -> OperatorKey:
    if settings.key_secret and settings.operator_namespace:
        return await operator_key.obtained(kube, settings.operator_namespace, settings.key_secret)
    log.warning("no --key-secret is named: the tokens of all models are replaced at every start of the operator")
    return operator_key.passing()


async def _live_page(board: Board, settings: Settings, leadership: Leadership | None) -> web.AppRunner | None:
    """None: it is off, or can't be served, for which nothing else has to suffer."""
    if settings.live_page == "Off":
        return None
    local = settings.live_page == "Local"

    def elsewhere() -> Leader | None:
        return None if leadership is None or leadership.leads() else Leader(leadership.leader, leadership.page)

    try:
        return await site.serve(
            site.site(board, local=local, elsewhere=elsewhere), port=settings.live_port, local=local
        )
    except OSError as error:
        log.warning("the live page can't be served on port %d: %s", settings.live_port, error)
        return None


@asynccontextmanager
async def _leading(leadership: Leadership | None, metrics: Metrics) -> AsyncIterator[None]:
    """Begins when this process leads; when it can't any more, the process ends: nothing may be left that acts."""
    metrics.leader.set(leadership is None)
    if leadership is None:
        yield
        return
    try:
        await leadership.won()
        metrics.leader.set(1)
        yield
    finally:
        await leadership.resign()


def _heed_signals() -> None:
    """Ends the calling task: the first process of a container ignores signals that it doesn't ask for."""
    if task := asyncio.current_task():
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)


@dataclass(slots=True)
class Work:
    """What kopf's watches are for. Each of its lives has indexes and loops of its own."""

    settings: Settings
    kube: ApiServer
    key: OperatorKey
    schema: ServedSchema
    metrics: Metrics
    namespaces: Namespaces
    board: Board = field(default_factory=Board)
    tell: Tell = unheard
    ended: asyncio.Event = field(default_factory=asyncio.Event)  # the loops, by themselves or not
    loops: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def __call__(self, indexes: Indexes) -> AsyncIterator[handlers.Changed]:
        """Whom to tell of models that may have changed. What runs meanwhile ends when the context does."""
        queue = WorkQueue[ModelKey](time.monotonic)
        groups = StatusPoller(queue.add_after, time.time, self._heard, partial(queue.add, urgent=True))
        reconciler = Reconciler(
            self.kube,
            groups,
            self.settings,
            self.metrics,
            time.time,
            self.key,
            schema=self.schema,
            indexes=indexes,
            board=self.board,
            tell=self.tell,
        )

        async def reconcile(key: ModelKey) -> ReconcileOutcome:
            if self.namespaces.serves(key.namespace):
                return await reconciler.reconcile(key)
            return ReconcileOutcome(requeue_after=None)  # it is heard of again when its namespace is back

        def doubt(key: ModelKey) -> None:
            reconciler.doubt(key)
            queue.add(key)

        controller = Controller(queue, reconcile, self.metrics)
        census = Census(self.kube, indexes, self.namespaces.served)
        nodes = NodeConditions(self.kube, reconciler.suspicion, time.time, reconciler.knows_all)
        self.loops = asyncio.create_task(
            self._run(
                controller.run(self.settings.concurrency),
                served_schema.watch(self.kube, self.schema, self.metrics),
                census.watch(doubt),
                *([nodes.watch()] if self.settings.node_conditions else []),
            ),
            name="loops",
        )
        self.loops.add_done_callback(lambda _: self.ended.set())
        try:
            yield queue.add
        finally:
            self.loops.cancel()
            await asyncio.wait({self.loops})
            await groups.close()
            reconciler.forget_others(self.namespaces.serves)
            self.board.clear()

    def _heard(self, key: ModelKey, group: int, status: GroupStatus) -> None:
        self.metrics.heard(key, group, status)
        self.board.heard(key, group, status)

    async def _run(self, *endless: Coroutine[Any, Any, None]) -> None:
        """Until other namespaces can be served than could when this began."""
        async with asyncio.TaskGroup() as loops:
            tasks = [loops.create_task(loop) for loop in endless]
            await self.namespaces.other_than(self.namespaces.served)
            for task in tasks:
                task.cancel()


async def _watch(work: Work, watching: asyncio.Event) -> bool:
    """One life of kopf's. Whether another is to follow, since other namespaces can be served; not after a signal.
    Raises what ended the loops."""
    await _until_served(work.kube, work.namespaces, work.settings)
    work.ended.clear()
    try:
        await kopf.operator(
            registry=handlers.registry(work, nodes=work.settings.watch_nodes),
            settings=handlers.kopf_settings(),
            clusterwide=not work.settings.namespaces,
            namespaces=work.namespaces.served,
            ready_flag=watching,
            stop_flag=work.ended,
        )
    finally:
        _heed_signals()  # kopf leaves its handlers behind, which do nothing
    if work.loops is None or work.loops.cancelled():
        return False
    work.loops.result()
    return True


async def _until_served(kube: ApiServer, namespaces: Namespaces, settings: Settings) -> None:
    """Wait for the CRD, and for a namespace that may be watched: kopf must begin with one."""
    if settings.namespaces:
        await namespaces.look()
        if not namespaces.served:
            log.warning("waiting until one of %s can be served", ", ".join(settings.namespaces))
        while not namespaces.served:
            await asyncio.sleep(SCHEMA_RETRY_SECONDS)
            await namespaces.look()
        return
    told = False
    while True:
        try:
            await kube.find(KIND, "default")
        except KubeError as error:
            if not told:
                log.warning("waiting until the API server serves %s: %s", KIND, error)
            told = True
            await asyncio.sleep(SCHEMA_RETRY_SECONDS)
        else:
            log.info("serving %s in all namespaces", KIND)
            return


if __name__ == "__main__":
    main()
