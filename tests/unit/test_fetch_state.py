"""What the pod's fetcher says, and what the other processes of the pod make of it."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from lockstep_runtime.config import ServeConfig
from lockstep_runtime.host import shm_files
from lockstep_runtime.host.process_init import PARENT_VARIABLE
from lockstep_runtime.protocol.bus import LoadFailure
from lockstep_runtime.protocol.status import Download
from lockstep_runtime.sources import fetch_state, model_folder
from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.sources.fetch_state import FetchState, StateWriter, read_state
from lockstep_runtime.sources.lease import Progress
from lockstep_runtime.sources.model_folder import StillFetchingError, await_model, commit_of, locate

COMMIT = "a" * 40
CONFIG = ServeConfig(model="org/model", served_name="model")


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where it is said, if this process is its own supervisor."""
    monkeypatch.setenv(PARENT_VARIABLE, str(os.getpid()))
    monkeypatch.setenv(shm_files.FOLDER_VARIABLE, str(tmp_path))
    path = shm_files.fetch_file(os.environ)
    assert path is not None
    return path


def test_a_model_is_located_when_it_is_fetched_and_not_before(state: Path, tmp_path: Path) -> None:
    with pytest.raises(StillFetchingError):
        locate(CONFIG)
    assert commit_of(CONFIG) == ""
    writer = StateWriter(state)
    writer.resolved(COMMIT)
    assert commit_of(CONFIG) == COMMIT
    writer.failed(ModelError("the hub fails", kind=LoadFailure.TRANSIENT, retry_after=30.0))
    with pytest.raises(ModelError, match="the hub fails") as caught:
        locate(CONFIG)
    assert (caught.value.kind, caught.value.retry_after) == (LoadFailure.TRANSIENT, 0.0)
    writer.failed(ModelError("it is gated", kind=LoadFailure.PERMANENT))
    with pytest.raises(ModelError, match="it is gated") as caught:
        locate(CONFIG)
    assert caught.value.kind is LoadFailure.PERMANENT
    writer.fetched(tmp_path / "snapshot")
    writer.tell(Progress(done=1, total=2, moved=1))  # of a thread that is late
    assert locate(CONFIG) == tmp_path / "snapshot"
    assert commit_of(CONFIG) == COMMIT


def test_a_folder_has_no_commit_and_waits_for_nobody(state: Path, tmp_path: Path) -> None:
    here = ServeConfig(model=str(tmp_path), served_name="model")
    assert (locate(here), commit_of(here)) == (tmp_path, "")
    with pytest.raises(ModelError, match="can't be found"):
        locate(ServeConfig(model=str(tmp_path / "absent"), served_name="model"))


def test_who_waits_hears_how_far_it_is(state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_state, "WRITE_SECONDS", 0.0)
    told: list[tuple[Download, int]] = []
    writer = StateWriter(state)

    def fetch() -> None:
        for done in (10, 40, 100):
            writer.tell(Progress(done=done, total=100, moved=done + 1))
            deadline = time.monotonic() + 30
            while (not told or told[-1][0].done != done) and time.monotonic() < deadline:
                time.sleep(0.01)
        writer.fetched(tmp_path)

    thread = threading.Thread(target=fetch)
    thread.start()
    assert await_model(CONFIG, lambda download, moved: told.append((download, moved))) == tmp_path
    thread.join()
    assert [(one.done, one.percent, moved) for one, moved in told] == [(10, 10, 11), (40, 40, 41), (100, 100, 101)]


def test_who_hears_nothing_says_so(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_folder, "UNTOLD_SECONDS", 0.2)
    with pytest.raises(ModelError, match="has not found out yet which commit") as caught:
        await_model(CONFIG, lambda *_: None)
    assert caught.value.kind is LoadFailure.TRANSIENT


def test_what_is_told_changes_in_few_steps(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_state, "WRITE_SECONDS", 0.0)
    writer = StateWriter(state)
    told = []
    for done in range(1001):
        writer.tell(Progress(done=done, total=1000, moved=done))
        told.append(read_state(state).download)
    assert sorted({one.percent for one in told if one}) == [0, 1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100]
    assert len({(one.percent, one.rate) for one in told if one}) == 13
    writer.tell(Progress())
    assert read_state(state).download == Download(done=0, total=0, percent=0, rate=0.0)


def test_a_state_that_is_not_there_or_torn_is_an_empty_one(tmp_path: Path) -> None:
    assert read_state(tmp_path / "absent") == FetchState()
    (tmp_path / "torn").write_text('{"commit": "a')
    assert read_state(tmp_path / "torn") == FetchState()
