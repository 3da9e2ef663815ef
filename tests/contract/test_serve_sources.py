"""`lockstep serve` with a model of a hub: two pods of a group, on real processes, with a hub of this machine."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from tests.support.fake_hub import COMMIT, Failure, FakeHub, fake_hub
from tests.support.http import HTTP
from tests.support.ports import free_port
from tests.support.serve import TINY_CHAT, TOKEN, Served, served

from lockstep_runtime.protocol.status import GroupState

SIZE = (TINY_CHAT / "model.safetensors").stat().st_size
SECRET = "hf_oneThatNobodyElseMayHave"
MOVED = "f" * 40


class Pods:
    """Of one group of two ranks, one in each, with one cache."""

    def __init__(self, directory: Path, hub: FakeHub) -> None:
        self._directory, self._hub, self.bus = directory, hub, free_port()

    def pod(self, index: int, *more: str) -> AbstractContextManager[Served]:
        source = f"name=corp,endpoint={self._hub.url},token-variable=CORP_TOKEN,cache={self._directory / 'cache'}"
        arguments = (
            "--source", source, "--tensor-parallel-size", "2", "--ranks-per-pod", "1", "--threads-per-rank", "1",
            "--pod-index", str(index), "--leader", "127.0.0.1", *more,
        )  # fmt: skip
        ports = (free_port(), self.bus, free_port())
        environment = {"CORP_TOKEN": SECRET, "HF_TOKEN": SECRET}
        return served(self._directory, *arguments, model=Path("corp:org/model"), ports=ports, environment=environment)

    @contextlib.contextmanager
    def both(self, *more: str) -> Iterator[tuple[Served, Served]]:
        with self.pod(0, *more) as leader, self.pod(1, *more) as member:
            yield leader, member


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    folder = tmp_path / "repository"
    shutil.copytree(TINY_CHAT, folder)
    with fake_hub(folder) as hub:
        hub.token = SECRET
        yield hub


def descendants(serve: Served) -> list[int]:
    found = serve.child_pids()
    for pid in found:
        children = Path(f"/proc/{pid}/task/{pid}/children")
        with contextlib.suppress(OSError):
            found += [int(one) for one in children.read_text().split()]
    return found


def answer(serve: Served) -> str:
    body = {"model": "model", "prompt": "The", "max_tokens": 8, "temperature": 0}
    got = HTTP.post(f"{serve.api}/v1/completions", json=body, timeout=120)
    assert got.status_code == 200, got.text
    return str(got.json()["choices"][0]["text"])


def test_a_group_downloads_once_and_says_how_far_and_its_workers_never_see_the_token(
    hub: FakeHub, tmp_path: Path
) -> None:
    hub.slow = 0.5
    with Pods(tmp_path, hub).both() as (leader, member):
        leader.until(lambda: leader.is_ready() or _percent(leader) >= 5, "the download is told", 120)
        assert not leader.is_ready()
        told = leader.status()
        assert (told.state, told.commit) == (GroupState.LOADING, COMMIT)
        assert "MB of the model are downloaded" in told.message
        assert told.download is not None
        assert told.download.total == sum(path.stat().st_size for path in TINY_CHAT.iterdir())
        for serve in (leader, member):
            assert [pid for pid in descendants(serve) if SECRET in _told_by(pid)] == []
        hub.slow = 0.0
        leader.ready()
        told = leader.status()
        assert (told.commit, told.download, told.faults) == (COMMIT, None, [])
        assert answer(leader)
        assert hub.sent == {path.name: path.stat().st_size for path in TINY_CHAT.iterdir()}
        for serve in (leader, member):
            assert [pid for pid in descendants(serve) if SECRET in _told_by(pid)] == []
            assert SECRET not in serve.log.read_text()
            config = HTTP.get(f"{serve.status_url}/config", headers={"Authorization": f"Bearer {TOKEN}"})
            assert (config.status_code, SECRET in config.text) == (200, False)
    assert {given for _, given in hub.tokens} == {f"Bearer {SECRET}", ""}


def test_all_pods_load_one_commit_whichever_is_started_again(hub: FakeHub, tmp_path: Path) -> None:
    pods = Pods(tmp_path, hub)
    with pods.pod(0) as leader, contextlib.ExitStack() as others:
        others.enter_context(pods.pod(1))
        leader.ready()
        hub.revisions = {"main": MOVED, "old": COMMIT}
        others.close()
        with pods.pod(1) as member:
            leader.until(lambda: f"at {COMMIT} is in" in member.log.read_text(), "it has the group's commit", 120)
            leader.until(lambda: leader.status().state is GroupState.READY, "the group is whole again", 120)
            leader.process.kill()
            leader.process.wait()
            with pods.pod(0) as leader:
                leader.ready()
                assert leader.status().commit == MOVED
                assert f"loads commit {MOVED} now, not {COMMIT}" in member.log.read_text()
                assert f"at {MOVED} is in" in member.log.read_text()
                assert answer(leader)
    assert hub.sent["model.safetensors"] == SIZE


def test_a_pinned_and_complete_model_needs_no_hub(hub: FakeHub, tmp_path: Path) -> None:
    pods = Pods(tmp_path, hub)
    with pods.both() as (leader, _):
        leader.ready()
    hub.failure, hub.asked = Failure(503), []
    with pods.both("--commit", COMMIT) as (leader, _):
        leader.ready()
        assert leader.status().commit == COMMIT
    assert hub.asked == []


def test_why_it_can_not_be_fetched_is_told_until_it_can(hub: FakeHub, tmp_path: Path) -> None:
    hub.failure = Failure(503)
    with Pods(tmp_path, hub).both() as (leader, _):
        leader.until(lambda: _told(leader, f"{hub.url} fails (503)"), "the hub's failure is told", 120)
        assert leader.status().may_pass is True
        hub.failure, hub.gated = None, True
        leader.until(lambda: _told(leader, "org/model is gated"), "that it is gated is told", 120)
        assert leader.status().may_pass is False
        hub.gated = False
        leader.ready()
        assert leader.status().faults == []


def _told(serve: Served, words: str) -> bool:
    try:
        status = serve.status()
    except Exception:
        return False
    return status.state is GroupState.FAILED and words in status.message


def _percent(serve: Served) -> int:
    try:
        download = serve.status().download
    except Exception:
        return 0
    return download.percent if download else 0


def _told_by(pid: int) -> str:
    """What anybody of the same user reads of a process."""
    text = ""
    for name in ("cmdline", "environ"):
        with contextlib.suppress(OSError):
            text += Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace")
    return text
