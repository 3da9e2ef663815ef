"""The loop around reconciliations: bounded concurrency, growing delays, a look at everything now and then."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Final

from lockstep_operator.backoff import backoff
from lockstep_operator.cluster.client import KubeError
from lockstep_operator.reconcile import ReconcileOutcome
from lockstep_operator.reporting.metrics import Metrics
from lockstep_operator.types.names import ModelKey
from lockstep_operator.workqueue import WorkQueue

log = logging.getLogger(__name__)

RETRY_FIRST: Final = 0.5
RETRY_MOST: Final = 60.0
REFUSED_FIRST: Final = 2.0
REFUSED_MOST: Final = 300.0
URGENT_WORKERS: Final = 4  # beside those that work on anything, so that a fault waits for no other model's pass
BUSY_PASSES: Final = 20  # so many writing passes in a row are convergence; more may be a fight with someone


class Controller:
    def __init__(
        self, queue: WorkQueue[ModelKey], reconcile: Callable[[ModelKey], Awaitable[ReconcileOutcome]], metrics: Metrics
    ) -> None:
        self._queue = queue
        self._reconcile = reconcile
        self._metrics = metrics
        self._failures: dict[ModelKey, int] = {}
        self._busy: dict[ModelKey, int] = {}

    async def run(self, concurrency: int) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            for number in range(concurrency):
                group.create_task(self._work(), name=f"worker {number}")
            for number in range(URGENT_WORKERS):
                group.create_task(self._work(urgent=True), name=f"worker {number} for faults")

    async def _work(self, *, urgent: bool = False) -> None:
        while True:
            key, delay = await self._queue.take(urgent=urgent), None
            try:
                delay = await self.step(key)
            finally:
                was_urgent = self._queue.done(key)
            self._metrics.queued.set(len(self._queue))
            if delay == 0.0 and was_urgent:  # what it has decided is to be done
                self._queue.add(key, urgent=True)
            elif delay is not None:
                self._queue.add_after(key, delay)

    async def step(self, key: ModelKey) -> float | None:
        """Reconcile once; return the seconds until the model must be looked at again, None when it is gone."""
        with self._metrics.seconds.time():
            try:
                outcome = await self._reconcile(key)
            except KubeError as error:
                log.warning("%s: %s; it is tried again", key, error)
                return self._retry(key, "error", RETRY_FIRST, RETRY_MOST)
            except Exception:  # one model must not stop the others; what failed is told and tried again
                log.exception("%s: reconciling failed", key)
                return self._retry(key, "bug", REFUSED_FIRST, REFUSED_MOST)
        self._failures.pop(key, None)
        result = "failing" if outcome.failing else "wrote" if outcome.wrote else "quiet"
        self._metrics.reconciles.labels(result).inc()
        if outcome.requeue_after is not None:  # else the model is gone, and so are its series
            self._metrics.reconciled(key, failed=outcome.failing)
        return self._settle(key, outcome)

    def _retry(self, key: ModelKey, result: str, first: float, most: float) -> float:
        self._metrics.reconciles.labels(result).inc()
        self._metrics.reconciled(key, failed=True)
        self._failures[key] = self._failures.get(key, 0) + 1
        return backoff(self._failures[key], first, most)

    def _settle(self, key: ModelKey, outcome: ReconcileOutcome) -> float | None:
        if outcome.requeue_after is None:
            self._busy.pop(key, None)
            return None
        self._busy[key] = self._busy.get(key, 0) + 1 if outcome.wrote else 0
        if self._busy[key] > BUSY_PASSES:
            return backoff(self._busy[key] - BUSY_PASSES, RETRY_FIRST, RETRY_MOST)
        return outcome.requeue_after if outcome.wrote else outcome.requeue_after * random.uniform(0.8, 1.0)
