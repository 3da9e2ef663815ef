"""What the pod's fetcher says, in a file of the pod's shared memory: engine, api and workers read it.

A file, since whoever was started anew must learn it too, and the fetcher ends when it is done.
"""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Final

import msgspec

from lockstep_runtime.protocol.bus import LoadFailure
from lockstep_runtime.protocol.status import Download
from lockstep_runtime.sources.errors import ModelError, may_pass
from lockstep_runtime.sources.hub_cache import write_atomically
from lockstep_runtime.sources.lease import Progress

WRITE_SECONDS: Final = 0.2  # between two
RATE_SECONDS: Final = 10.0  # that a rate is measured over
LEAST_SECONDS: Final = 0.1
STEPS: Final = (0, 1, 5, *range(10, 101, 10))  # per cent at which what is told changes


class FetchState(msgspec.Struct, frozen=True, kw_only=True):
    """`folder`: of the model, once it is whole. `error`: why it could not be brought; it is tried again."""

    commit: str = ""
    folder: str = ""
    download: Download | None = None
    moved: int = 0
    error: str = ""
    failure: LoadFailure = LoadFailure.TRANSIENT


def read_state(path: Path) -> FetchState:
    """An empty one before there is any."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=FetchState)
    except (OSError, msgspec.MsgspecError):
        return FetchState()


class StateWriter:
    """The fetcher's side. Its methods may be called by several threads, `tell` often."""

    def __init__(self, path: Path) -> None:
        self._path, self._state = path, FetchState()
        self._written = 0.0
        self._recent: deque[tuple[float, int]] = deque()  # when so many bytes were there
        self._step, self._rate = 0, 0.0
        self._write()

    def resolved(self, commit: str) -> None:
        self._state = FetchState(commit=commit, moved=self._state.moved)
        self._recent.clear()
        self._step, self._rate = 0, 0.0
        self._write()

    def fetched(self, folder: Path) -> None:
        self._state = FetchState(commit=self._state.commit, folder=str(folder), moved=self._state.moved)
        self._write()

    def failed(self, error: ModelError) -> None:
        failure = LoadFailure.TRANSIENT if may_pass(error) else LoadFailure.PERMANENT
        self._state = FetchState(commit=self._state.commit, moved=self._state.moved, error=str(error), failure=failure)
        self._write()

    def tell(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._written >= WRITE_SECONDS and not self._state.folder:
            download = self._download(progress, now)
            self._state = msgspec.structs.replace(self._state, download=download, moved=progress.moved)
            self._write()

    def _download(self, progress: Progress, now: float) -> Download:
        self._recent.append((now, progress.done))
        while now - self._recent[0][0] > RATE_SECONDS:
            self._recent.popleft()
        percent = int(100 * progress.done / progress.total) if progress.total else 0
        step = max(one for one in STEPS if one <= max(0, min(percent, 100)))
        if step != self._step:
            begun, had = self._recent[0]
            self._step, self._rate = step, max(0.0, (progress.done - had) / max(now - begun, LEAST_SECONDS))
        return Download(done=progress.done, total=progress.total, percent=self._step, rate=round(self._rate))

    def _write(self) -> None:
        self._written = time.monotonic()
        write_atomically(self._path, msgspec.json.encode(self._state))
