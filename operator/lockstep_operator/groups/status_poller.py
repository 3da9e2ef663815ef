"""Long-polls the status of every group: one idle connection each, answered when something changed.

No reconciliation waits for it: a new report is kept, and the model is queued.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Final

import aiohttp
import msgspec

from lockstep_operator.backoff import backoff
from lockstep_operator.groups.group_view import REFUSED_SECONDS, UNREACHABLE_SECONDS, progress
from lockstep_operator.types.names import ModelKey
from lockstep_operator.types.observed import GroupReport
from lockstep_runtime.protocol.status import STATUS_PORT, GroupState, GroupStatus, Latency
from lockstep_runtime.protocol.tokens import Purpose, purpose_token

log = logging.getLogger(__name__)

ANSWER_SECONDS: Final = 45.0  # the group answers after 30 at the latest
CONNECT_SECONDS: Final = 5.0
MAX_STATUS_BYTES: Final = 4 * 1024 * 1024
FIRST_DELAY: Final = 0.25
MAX_DELAY: Final = 15.0
PAUSE_SECONDS: Final = 0.2  # between answers, however fast they come
FIRST_ASKED: Final = 128  # groups at once; those that have answered wait for news, all of them
_NO_ANSWER: Final = (aiohttp.ClientError, TimeoutError, OSError, msgspec.MsgspecError, ValueError)


@dataclass(frozen=True, slots=True)
class PollTarget:
    """A group's leader pod. Another pod, address or token (that the pod knows the operator by) is another target.
    `fenced`: it is to take no requests."""

    pod_uid: str
    address: str
    token: str = field(repr=False)
    port: int = STATUS_PORT
    fenced: bool = False

    @property
    def url(self) -> str:
        return f"{self._base}/status"

    @property
    def fence_url(self) -> str:
        return f"{self._base}/fence"

    @property
    def _base(self) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"http://{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    body: bytes


class _RefusedError(ValueError):
    """It is alive, but lets the operator ask for nothing."""


class StatusPoller:
    """Calls `changed(key, seconds)` when a model should be reconciled after at most so many seconds, `alarmed(key)`
    when that can't wait for other models, and `heard(key, group, status)` with every report, for measurements."""

    def __init__(
        self,
        changed: Callable[[ModelKey, float], None],
        now: Callable[[], float],
        heard: Callable[[ModelKey, int, GroupStatus], None] = lambda key, group, status: None,
        alarmed: Callable[[ModelKey], None] = lambda key: None,
    ) -> None:
        self._changed = changed
        self._now = now
        self._on_report = heard
        self._alarmed = alarmed
        self._first = asyncio.Semaphore(FIRST_ASKED)
        self._tasks: dict[tuple[ModelKey, int], tuple[PollTarget, asyncio.Task[None]]] = {}
        self._reports: dict[tuple[ModelKey, int], tuple[str, GroupReport]] = {}
        self._session: aiohttp.ClientSession | None = None

    def watch(self, key: ModelKey, targets: Mapping[int, PollTarget]) -> None:
        """Poll these groups of the model, and no others of it."""
        for known, (target, _) in list(self._tasks.items()):
            if known[0] == key and targets.get(known[1]) != target:
                self._stop(known)
        for group, target in targets.items():
            if (key, group) not in self._tasks:
                task = asyncio.create_task(self._poll(key, group, target), name=f"status of {key} group {group}")
                self._tasks[key, group] = (target, task)

    def reports(self, key: ModelKey, leaders: Mapping[int, str]) -> dict[int, GroupReport]:
        """The last reports of the groups whose leader pod has this UID."""
        found = {group: self._reports.get((key, group)) for group in leaders}
        return {group: entry[1] for group, entry in found.items() if entry and entry[0] == leaders[group]}

    async def close(self) -> None:
        tasks = [task for _, task in self._tasks.values()]
        for known in list(self._tasks):
            self._stop(known)
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._session:
            await self._session.close()

    def _stop(self, known: tuple[ModelKey, int]) -> None:
        self._tasks.pop(known)[1].cancel()
        self._reports.pop(known, None)

    async def _poll(self, key: ModelKey, group: int, target: PollTarget) -> None:
        failures, seen = 0, None
        while True:
            try:
                async with contextlib.nullcontext() if seen else self._first:
                    status = await self._fetch(target, seen)
                self._received(key, group, target, status)
                if status.fenced is not target.fenced:
                    await self._fence(key, group, target)
            except _NO_ANSWER as error:
                failures += 1
                await self._failed(key, group, target, error, failures)
            except Exception as error:  # a bug must not end the only task that polls this group
                log.exception("%s: the status of group %d can't be processed", key, group)
                failures += 1
                await self._failed(key, group, target, error, failures)
            else:
                failures, seen = 0, status
                await asyncio.sleep(PAUSE_SECONDS)

    async def _fetch(self, target: PollTarget, seen: GroupStatus | None) -> GroupStatus:
        """Returns at once when the group's status differs from `seen`, else when it changes."""
        known = f"{seen.incarnation}/{seen.revision}" if seen else ""
        token = purpose_token(target.token, Purpose.STATUS)
        answer = await self._get(target, token, known)
        if answer.status == HTTPStatus.UNAUTHORIZED:
            raise _RefusedError("it doesn't take the operator's token")
        if answer.status != 200:
            raise ValueError(f"status {answer.status}")
        return msgspec.json.decode(answer.body, type=GroupStatus)

    async def _get(self, target: PollTarget, token: str, after: str) -> _Answer:
        query, headers = ({"after": after} if after else {}), {"Authorization": f"Bearer {token}"}
        async with self._connected().get(target.url, params=query, headers=headers, allow_redirects=False) as response:
            return _Answer(response.status, await _bounded(response.content))

    async def _fence(self, key: ModelKey, group: int, target: PollTarget) -> None:
        """Or lift its fence. A pod that is made anew has none, and hears of it here before it serves."""
        ask = self._connected().put if target.fenced else self._connected().delete
        headers = {"Authorization": f"Bearer {purpose_token(target.token, Purpose.FENCE)}"}
        async with ask(target.fence_url, headers=headers, allow_redirects=False) as response:
            if response.status != HTTPStatus.OK:
                log.warning("%s: group %d can't be fenced or freed: status %d", key, group, response.status)
                await asyncio.sleep(MAX_DELAY)

    def _connected(self) -> aiohttp.ClientSession:
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS, sock_connect=CONNECT_SECONDS)
            self._session = aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0))
        return self._session

    def _received(self, key: ModelKey, group: int, target: PollTarget, status: GroupStatus) -> None:
        before = self._report(key, group)
        self._reports[key, group] = (target.pod_uid, GroupReport(status=status))
        self._on_report(key, group, status)
        if (
            before.status is None
            or before.unreachable_since is not None
            or significant_part(before.status) != significant_part(status)
        ):
            self._changed(key, 0.0)
            if has_new_fault(before.status, status):
                self._alarmed(key)

    async def _failed(self, key: ModelKey, group: int, target: PollTarget, error: Exception, failures: int) -> None:
        before = self._report(key, group)
        refused, text = isinstance(error, _RefusedError), str(error) or type(error).__name__
        lasts = before.unreachable_since is not None and refused is before.refused
        since = before.unreachable_since if lasts else self._now()
        self._reports[key, group] = (
            target.pod_uid,
            replace(before, unreachable_since=since, error=text, refused=refused),
        )
        if not lasts:
            log.info("%s: group %d does not answer: %s", key, group, text)
            self._changed(key, (REFUSED_SECONDS if refused else UNREACHABLE_SECONDS) + 1)
        await asyncio.sleep(backoff(failures, FIRST_DELAY, MAX_DELAY))

    def _report(self, key: ModelKey, group: int) -> GroupReport:
        entry = self._reports.get((key, group))
        return entry[1] if entry else GroupReport()


async def _bounded(content: aiohttp.StreamReader) -> bytes:
    """The whole body. Raises ValueError when it is longer than a status can be, whatever its headers say."""
    body = bytearray()
    async for chunk in content.iter_chunked(64 * 1024):
        body += chunk
        if len(body) > MAX_STATUS_BYTES:
            raise ValueError(f"more than {MAX_STATUS_BYTES} bytes are too many for a status")
    return bytes(body)


def has_new_fault(before: GroupStatus | None, status: GroupStatus) -> bool:
    """Whether the group is poisoned, or tells of a fault that it didn't before."""
    if status.state is GroupState.POISONED:
        return True
    return before is not None and bool({one.id for one in status.faults} - {one.id for one in before.faults})


def significant_part(status: GroupStatus) -> object:
    """The part whose change needs a reconciliation: all but the measurements that every step changes."""
    ranks = [
        (rank.rank, rank.state, rank.pod, rank.node, rank.incarnation, rank.epoch, rank.respawns, rank.message)
        for rank in status.ranks
    ]
    bare = msgspec.structs.replace(
        status,
        revision=0,
        message="" if status.state is GroupState.LOADING else status.message,  # it counts megabytes
        ranks=[],
        step_latency=Latency(),
        last_step_at=None,
        requests_running=0,
        requests_waiting=0,
        pod_problems=[],
    )
    problems = {(problem.pod_index, problem.reason) for problem in status.pod_problems}  # not how often
    return bare, ranks, progress(status), problems, measured(status)


def measured(status: GroupStatus) -> frozenset[int | None]:
    """Which ranks (None: the group) have latencies: the first ones need a reconciliation."""
    ranks = {rank.rank for rank in status.ranks if rank.step_latency != Latency()}
    return frozenset(ranks | ({None} if status.step_latency != Latency() else set()))
