"""Asks the supervisors for their workers' progress records: what can be known of a rank that answers nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final

from lockstep_runtime.protocol import bus
from lockstep_runtime.recovery.bus_server import Peer

LOOK_SECONDS: Final = 0.4  # a supervisor that is out of reach has nothing to say


class ProgressQuery:
    """`supervisors` by pod, as they are connected at any time."""

    def __init__(self, supervisors: Mapping[int, Peer]) -> None:
        self._supervisors = supervisors
        self._asked = 0
        self._reports: dict[int, list[bus.ProgressRecord]] = {}
        self._came = asyncio.Event()

    async def fetch(self) -> list[bus.ProgressRecord]:
        """The records of all ranks whose supervisors answer in time."""
        self._asked += 1
        self._reports = {}
        asked = dict(self._supervisors)
        for supervisor in asked.values():
            supervisor.send(bus.ReadProgress(asked=self._asked))
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                while len(self._reports) < len(asked):
                    self._came.clear()
                    await self._came.wait()
        except TimeoutError:
            pass
        return [record for records in self._reports.values() for record in records]

    def take(self, pod_index: int, report: bus.ProgressReport) -> None:
        """A supervisor's answer; one to an earlier question is of no use."""
        if report.asked == self._asked:
            self._reports[pod_index] = report.records
            self._came.set()
