"""The election in a thread of its own: its renewals don't wait for the operator's work, however much of that there is.

A loop that works for thousands of models may not turn for seconds. Whether it turns at all, the liveness probe asks.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Final

from lockstep_operator.cluster.client import ApiServer, connect
from lockstep_operator.cluster.election import Candidate, Election

log = logging.getLogger(__name__)

LOST_LEASE: Final = 3  # exit status


class Leadership:
    """`end` ends the process at once; it is called when this process led and can't any more. Other methods are for
    the operator's own thread."""

    def __init__(self, candidate: Candidate, end: Callable[[int], None] = os._exit) -> None:
        self._candidate = candidate
        self._end = end
        self._election: Election | None = None
        self._began: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._won: Future[None] = Future()
        self._led = False
        self._thread = Thread(target=self._run, name="lease", daemon=True)

    def leads(self) -> bool:
        return self._election is not None and self._election.leads()

    @property
    def problem(self) -> str:
        """Why this process could not lead if it had to; empty when it could."""
        return self._election.problem if self._election else "the API server isn't asked yet"

    @property
    def leader(self) -> str:
        return self._election.leader if self._election else "nobody"

    @property
    def page(self) -> str:
        """Where the leader's live page is reached; empty if nowhere."""
        return self._election.page if self._election else ""

    async def won(self) -> None:
        """Wait until this process leads. Raises what the election failed by."""
        self._thread.start()
        await asyncio.wrap_future(self._won)

    async def resign(self) -> None:
        """Stand for election no more, and let another begin at once."""
        if not self._thread.is_alive():
            return
        loop, resigned = await asyncio.wrap_future(self._began)
        loop.call_soon_threadsafe(resigned.set)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        try:
            asyncio.run(self._campaign())
        except Exception as error:
            for future in (self._began, self._won):
                if not future.done():
                    future.set_exception(error)
            if self._led:  # and nobody renews its Lease now
                log.exception("the election failed")
                self._end(LOST_LEASE)

    async def _campaign(self) -> None:
        resigned = asyncio.Event()
        api_client = await connect()
        self._election = election = Election(ApiServer(api_client), self._candidate)
        self._began.set_result((asyncio.get_running_loop(), resigned))
        stop = asyncio.create_task(resigned.wait())
        try:
            if not await _before(stop, asyncio.create_task(election.won())):
                return
            self._led = True
            if self._won.set_running_or_notify_cancel():  # else nobody waits for it any more
                self._won.set_result(None)
            lost = asyncio.create_task(election.lost())
            if await _before(stop, lost):
                log.error("this operator ends, since it has lost its Lease: %s", lost.result())
                logging.shutdown()
                self._end(LOST_LEASE)
            await election.resign()
        finally:
            stop.cancel()
            await api_client.close()


async def _before(stop: asyncio.Task[bool], task: asyncio.Task[None] | asyncio.Task[str]) -> bool:
    """Whether the task came to its end before `stop` did; else it is cancelled. Raises what it raised."""
    await asyncio.wait({stop, task}, return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
        return False
    task.result()
    return True
