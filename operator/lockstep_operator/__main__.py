"""`lockstep-operator`: everything put together."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Coroutine
from typing import Any, Final

import kopf
from kopf._core.engines.peering import Identity

from lockstep_operator import handlers, server
from lockstep_operator import log as logs
from lockstep_operator.cluster import served_schema
from lockstep_operator.cluster.client import ApiServer, KubeError, connect
from lockstep_operator.cluster.namespaces import Namespaces
from lockstep_operator.cluster.served_schema import ServedSchema
from lockstep_operator.controller import Controller
from lockstep_operator.groups.status_poller import StatusPoller
from lockstep_operator.reconcile import ReconcileOutcome, Reconciler
from lockstep_operator.reporting.metrics import Metrics
from lockstep_operator.settings import Settings, read_settings
from lockstep_operator.types.names import KIND, ModelKey
from lockstep_operator.workqueue import WorkQueue

log = logging.getLogger("lockstep_operator")

SCHEMA_RETRY_SECONDS: Final = 2.0
# Only kopf's peering uses it, and that is off; the default asks for the user's name, which a pod's user doesn't have.
IDENTITY: Final = Identity("lockstep-operator")


def main() -> None:
    settings = read_settings(sys.argv[1:], os.environ)
    logs.configure(settings.log_level, settings.log_format)
    asyncio.run(run(settings))


async def run(settings: Settings) -> None:
    """Until a signal ends it (kopf takes SIGTERM and SIGINT) or a part of it fails."""
    metrics, queue = Metrics(), WorkQueue[ModelKey](time.monotonic)
    watching = asyncio.Event()
    api_client = await connect()
    schema = ServedSchema()
    groups = StatusPoller(queue.add_after, time.time, metrics.heard)

    def unready() -> str:
        return schema.problem if watching.is_set() else "models aren't watched yet"

    http = await server.serve(server.application(metrics, unready), settings.port)
    try:
        kube = ApiServer(api_client)
        namespaces = Namespaces(settings.namespaces, kube, metrics)
        await _until_served(kube, namespaces, settings)
        reconciler = Reconciler(kube, groups, settings, metrics, time.time, schema)

        async def reconcile(key: ModelKey) -> ReconcileOutcome:
            if namespaces.serves(key.namespace):
                return await reconciler.reconcile(key)
            reconciler.forget(key)  # it is heard of again when its namespace is back
            return ReconcileOutcome(requeue_after=None)

        await _until_first_ends(
            Controller(queue, reconcile, metrics).run(settings.concurrency),
            namespaces.keep_watching(),
            served_schema.watch(kube, schema, metrics),
            kopf.operator(
                registry=handlers.registry(queue.add),
                settings=handlers.kopf_settings(),
                identity=IDENTITY,
                insights=namespaces.insights,
                clusterwide=not settings.namespaces,
                namespaces=namespaces.served,
                ready_flag=watching,
            ),
        )
    finally:
        await groups.close()
        await api_client.close()
        await http.cleanup()


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


async def _until_first_ends(*parts: Coroutine[Any, Any, None]) -> None:
    """Run all; when one ends, or fails, end the others."""
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


if __name__ == "__main__":
    main()
