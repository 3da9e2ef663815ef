"""Reports the group's status: its state, ranks and faults, and the number of requests."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from lockstep_runtime.config import ServeConfig
from lockstep_runtime.engine.client import Readiness
from lockstep_runtime.engine.scheduler import Scheduler
from lockstep_runtime.protocol import bus
from lockstep_runtime.protocol.status import GroupState, GroupStatus
from lockstep_runtime.recovery.changes import Changes
from lockstep_runtime.recovery.driver import GroupDriver
from lockstep_runtime.recovery.group_state import group_state, is_accepting, may_pass, slowest_download
from lockstep_runtime.recovery.latency import LatencyWindow

HEARTBEAT_SECONDS: Final = 4.0  # the supervisor believes a status for a few times as long
QUIET_STATUS_SECONDS: Final = 1.0  # between reports that only bring latencies


@dataclass(frozen=True, slots=True)
class Blocker:
    """What keeps the leader from serving, in a sentence; empty: nothing does. `may_pass`: by itself."""

    reason: str = ""
    may_pass: bool = False


class StatusReporter:
    """`model_error`: why the model's configuration can't be read. `api_is_awaited`: no request is accepted yet."""

    def __init__(self, config: ServeConfig, group: GroupDriver, changes: Changes) -> None:
        self._config, self._group, self._changes = config, group, changes
        self.model_error = Blocker()
        self.api_is_awaited = False
        self.commit = config.model_commit or ""
        self._blocker = Blocker()  # why the api can't answer
        self._loading = ""  # what it still reads
        self.last_step_at: float | None = None  # unix seconds
        self._latency = LatencyWindow()
        self._state, self._since = GroupState.STARTING, time.time()

    def stepped(self, seconds: float) -> None:
        """A step of requests took so long."""
        self._latency.add(seconds)
        self.last_step_at = time.time()

    def set_api(self, blocker: Blocker, *, loading: bool) -> None:
        """See `EngineClient.set_serving_blocker`."""
        self._blocker, self._loading = (Blocker(), blocker.reason) if loading else (blocker, "")
        self.api_is_awaited = False
        self._changes.tell()

    def state(self) -> tuple[GroupState, str]:
        """With a sentence."""
        problems = self._group.pod_problems
        return group_state(
            self._group.coordinator,
            time.monotonic(),
            draining=self._group.draining,
            blocker=self._worst.reason,
            loading=self._loading or ("the api is being started" if self.api_is_awaited else ""),
            problem=max(problems, key=lambda one: one.at).message if problems else "",
            leaving=self._group.departures.sentence,
        )

    @property
    def _worst(self) -> Blocker:
        return self.model_error if self.model_error.reason else self._blocker

    def readiness(self) -> Readiness:
        state, reason = self.state()
        leaving = bool(self._group.departures.sentence)
        return Readiness(self._accepts(state), reason, self._group.draining or leaving)

    def _accepts(self, state: GroupState) -> bool:
        return is_accepting(self._group.coordinator, state) and not self._group.departures.is_unready

    def status(self, scheduler: Scheduler | None) -> GroupStatus:
        """As of now."""
        state, message = self.state()
        if state is not self._state:
            self._state, self._since = state, time.time()
        group = self._group.coordinator
        return GroupStatus(
            model=self._config.model_name,
            group=self._config.group,
            incarnation="",
            spec_revision=self._config.spec_revision,
            epoch=group.epoch,
            state=state,
            message=message,
            since=self._since,
            accepting=self._accepts(state) and not self.api_is_awaited,
            may_pass=self._worst.may_pass if self._worst.reason else may_pass(group.handles),
            ranks=[handle.status() for handle in group.handles],
            step_latency=self._latency.latency(),
            last_step_at=self.last_step_at,
            requests_running=scheduler.running if scheduler else 0,
            requests_waiting=scheduler.waiting if scheduler else 0,
            recoveries=self._group.faults.recoveries,
            faults=self._group.faults.records,
            pod_problems=self._group.pod_problems,
            commit=self.commit,
            download=slowest_download(group.handles),
        )

    async def run(self, status: Callable[[], GroupStatus]) -> None:
        """Send it to the leader's supervisor, and to the others what their readiness follows: whenever it changed, and
        otherwise as a sign of life, until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_SECONDS):
                    await self._changes.next(QUIET_STATUS_SECONDS)
            if not self._group.supervisors:
                continue
            found = status()
            readiness = bus.GroupReadiness(
                accepting=bool(found.accepting), whole=found.state is GroupState.READY, message=found.message
            )
            for pod, supervisor in self._group.supervisors.items():
                supervisor.send(bus.StatusReport(status=found) if pod == 0 else readiness)
