"""A model is brought into the cache once, whole and right, whatever the hub, the network and the disk do meanwhile."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download
from tests.support.api_server import TINY_CHAT
from tests.support.fake_hub import COMMIT, MODEL, Failure, FakeHub, fake_hub, fresh_client

from lockstep_runtime.protocol.bus import LoadFailure
from lockstep_runtime.sources import hub as hub_module
from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.sources.fetch import Fetched, Wanted, fetch, resolve
from lockstep_runtime.sources.hub import Hub
from lockstep_runtime.sources.hub_cache import HubCache
from lockstep_runtime.sources.lease import Progress

WEIGHTS = "model.safetensors"
SIZE = (TINY_CHAT / WEIGHTS).stat().st_size
OTHER_COMMIT = "f" * 40
MEGABYTE = 1024 * 1024
# A process that fetches: its arguments are the hub's address and the cache.
FETCHER = """
import sys
from pathlib import Path
from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.sources.fetch import Wanted, fetch, resolve
from lockstep_runtime.sources.hub import Hub
from lockstep_runtime.sources.hub_cache import HubCache
wanted = Wanted(repo="org/model", cache=HubCache(Path(sys.argv[2]), "org/model"), hub=Hub(sys.argv[1], False))
try:
    print(fetch(wanted, resolve(wanted), lambda told: print(told.done, told.total, flush=True)).folder)
except ModelError as error:
    print(f"{error.kind}: {error}")
"""


@pytest.fixture(autouse=True)
def own_client(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with fresh_client(monkeypatch):
        yield


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    folder = tmp_path / "repository"
    shutil.copytree(TINY_CHAT, folder)
    with fake_hub(folder) as hub:
        yield hub


def wanted(hub: FakeHub, cache: Path, token: str | bool = False, **more: str) -> Wanted:
    return Wanted(repo=MODEL, cache=HubCache(cache, MODEL), hub=Hub(hub.url, token), **more)


def fetched(hub: FakeHub, cache: Path, tell: Callable[[Progress], None] = lambda _: None, **more: str) -> Fetched:
    one = wanted(hub, cache, **more)
    return fetch(one, resolve(one), tell)


def is_whole(folder: Path) -> bool:
    return all((folder / path.name).read_bytes() == path.read_bytes() for path in TINY_CHAT.iterdir())


def until(true: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def received(cache: Path) -> int:
    """Bytes of files on their way."""
    return sum(part.stat().st_size for part in cache.rglob("*.lockstep-part"))


def started(hub: FakeHub, cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", FETCHER, hub.url, str(cache)], stdout=subprocess.PIPE, text=True)


def test_a_model_is_two_questions_and_its_files(hub: FakeHub, tmp_path: Path) -> None:
    found = fetched(hub, tmp_path / "cache")
    assert found.commit == COMMIT
    assert is_whole(found.folder)
    questions = [path for path in hub.asked if path.startswith("/api/")]
    assert questions == [f"/api/models/{MODEL}/revision/main", f"/api/models/{MODEL}/revision/{COMMIT}"]
    assert len(hub.asked) == len(questions) + len([*TINY_CHAT.iterdir()]) + 1  # the weights' redirect
    assert hub.sent[WEIGHTS] == SIZE


def test_what_is_pinned_and_complete_is_used_without_a_request(hub: FakeHub, tmp_path: Path) -> None:
    fetched(hub, tmp_path / "cache")
    hub.asked.clear()
    hub.revisions["main"] = OTHER_COMMIT
    assert is_whole(fetched(hub, tmp_path / "cache", commit=COMMIT).folder)
    assert is_whole(fetched(hub, tmp_path / "cache", revision=COMMIT).folder)
    assert hub.asked == []


def test_a_branch_that_moved_is_another_commit_with_the_files_that_it_shares(hub: FakeHub, tmp_path: Path) -> None:
    fetched(hub, tmp_path / "cache")
    hub.revisions["main"] = OTHER_COMMIT
    (hub.folder / "generation_config.json").write_text('{"temperature": 0.5}')
    found = fetched(hub, tmp_path / "cache")
    assert found.commit == OTHER_COMMIT
    assert json.loads((found.folder / "generation_config.json").read_text()) == {"temperature": 0.5}
    assert hub.sent[WEIGHTS] == SIZE
    assert is_whole(fetched(hub, tmp_path / "cache", commit=COMMIT).folder)


def test_the_cache_is_that_of_huggingface_hub(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = Path(snapshot_download(MODEL, cache_dir=tmp_path / "cache", endpoint=hub.url))
    sent = dict(hub.sent)
    assert fetched(hub, tmp_path / "cache").folder == theirs
    assert hub.sent == sent
    ours = fetched(hub, tmp_path / "other").folder
    sent = dict(hub.sent)
    assert Path(snapshot_download(MODEL, cache_dir=tmp_path / "other", endpoint=hub.url)) == ours
    assert hub.sent == sent


def test_without_leave_to_ask_a_cache_that_others_filled_is_read_as_it_is(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(snapshot_download(MODEL, cache_dir=tmp_path / "cache", endpoint=hub.url))
    hub.asked.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert is_whole(fetched(hub, tmp_path / "cache").folder)
    for name, words in (("config.json", "config.json is missing"), (WEIGHTS, "has no safetensors file")):
        (folder / name).unlink()
        with pytest.raises(ModelError, match=words):
            fetched(hub, tmp_path / "cache")
    with pytest.raises(ModelError, match=f"commit {OTHER_COMMIT} was not fetched, and HF_HUB_OFFLINE"):
        fetched(hub, tmp_path / "cache", commit=OTHER_COMMIT)
    assert hub.asked == []


def test_without_leave_to_ask_what_is_missing_is_named(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = fetched(hub, tmp_path / "cache")
    hub.asked.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="org/model is not in the cache: main was never fetched, and HF_HUB_OFFLINE"):
        fetched(hub, tmp_path / "empty")
    whole = (found.folder / WEIGHTS).read_bytes()
    (found.folder / WEIGHTS).write_bytes(whole[:-1])
    with pytest.raises(ModelError, match=rf"not in the cache: {WEIGHTS} has {SIZE - 1} bytes instead of {SIZE}, and"):
        fetched(hub, tmp_path / "cache")
    assert (found.folder / WEIGHTS).stat().st_size == SIZE - 1, "nothing is thrown away that can't be fetched"
    (found.folder / WEIGHTS).write_bytes(whole)
    (found.folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"not in the cache: tokenizer.json is missing, and HF_HUB_OFFLINE") as caught:
        fetched(hub, tmp_path / "cache")
    assert caught.value.kind is LoadFailure.PERMANENT
    assert hub.asked == []


def test_a_connection_that_is_cut_goes_on_where_it_ended(hub: FakeHub, tmp_path: Path) -> None:
    hub.failure = Failure(200, where=WEIGHTS, after=3 * MEGABYTE)
    assert is_whole(fetched(hub, tmp_path / "cache").folder)
    assert hub.sent[WEIGHTS] <= SIZE + 2 * hub.piece


def test_a_download_that_was_killed_goes_on_where_it_ended(hub: FakeHub, tmp_path: Path) -> None:
    hub.slow = 0.05
    with started(hub, tmp_path / "cache") as process:
        until(lambda: received(tmp_path / "cache") > MEGABYTE)
        process.kill()
    kept = received(tmp_path / "cache")
    hub.slow, hub.sent[WEIGHTS] = 0.0, 0
    told: list[Progress] = []
    assert is_whole(fetched(hub, tmp_path / "cache", told.append).folder)
    assert hub.sent[WEIGHTS] <= SIZE - kept + 2 * hub.piece  # of the killed one, too
    assert received(tmp_path / "cache") == 0
    assert told[-1].done == told[-1].total == sum(path.stat().st_size for path in TINY_CHAT.iterdir())


def test_a_hub_that_knows_no_ranges_is_asked_for_the_whole(hub: FakeHub, tmp_path: Path) -> None:
    hub.no_ranges = True
    with started(hub, tmp_path / "cache") as process:
        hub.slow = 0.05
        until(lambda: received(tmp_path / "cache") > MEGABYTE)
        process.kill()
    hub.slow = 0.0
    assert is_whole(fetched(hub, tmp_path / "cache").folder)


@pytest.mark.parametrize("sent", [b"x" * SIZE, b"x" * (SIZE + 100), b""])
def test_wrong_contents_are_named_and_fetched_again(hub: FakeHub, tmp_path: Path, sent: bytes) -> None:
    hub.wrong[WEIGHTS] = sent
    with pytest.raises(ModelError) as caught:
        fetched(hub, tmp_path / "cache")
    assert caught.value.kind is LoadFailure.TRANSIENT
    words = (
        f"{WEIGHTS} of org/model came wrong from {hub.url}: its sha256 is" if sent else f"{hub.url} ended after 0 of"
    )
    assert words in str(caught.value)
    assert not (HubCache(tmp_path / "cache", MODEL).snapshot(COMMIT) / WEIGHTS).exists()
    hub.wrong.clear()
    assert is_whole(fetched(hub, tmp_path / "cache").folder)


def test_a_truncated_or_changed_file_of_the_cache_is_named_and_fetched_again(
    hub: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = fetched(hub, tmp_path / "cache").folder
    whole = (folder / WEIGHTS).read_bytes()
    for damaged, words in ((whole[:-1], f"has {SIZE - 1} bytes"), (b"y" + whole[1:], "has the sha256")):
        caplog.clear()
        (folder / WEIGHTS).write_bytes(damaged)
        with caplog.at_level(logging.WARNING):
            assert is_whole(fetched(hub, tmp_path / "cache", commit=COMMIT).folder)
        assert f"{WEIGHTS} of org/model {words}" in caplog.text
        assert "fetched again" in caplog.text


def test_a_file_that_only_looks_changed_is_read_once(hub: FakeHub, tmp_path: Path) -> None:
    folder = fetched(hub, tmp_path / "cache").folder
    os.utime(folder / WEIGHTS)
    told: list[Progress] = []
    fetched(hub, tmp_path / "cache", told.append, commit=COMMIT)
    assert told[-1].moved == SIZE
    told.clear()
    fetched(hub, tmp_path / "cache", told.append, commit=COMMIT)
    assert told[-1].moved == 0


def test_of_many_that_share_a_cache_one_downloads_and_all_tell_how_far(hub: FakeHub, tmp_path: Path) -> None:
    hub.slow = 0.02
    with started(hub, tmp_path / "cache") as other:
        until(lambda: received(tmp_path / "cache") > 0)
        told: list[Progress] = []
        threads = [
            threading.Thread(target=fetched, args=(hub, tmp_path / "cache", told.append), kwargs={"commit": COMMIT})
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        until(lambda: any(SIZE // 4 < one.done < one.total for one in told))
        hub.slow = 0.0
        for thread in threads:
            thread.join()
        printed = (other.stdout or sys.stdin).read()
    assert is_whole(Path(printed.splitlines()[-1]))
    assert hub.sent == {path.name: path.stat().st_size for path in TINY_CHAT.iterdir()}


def test_whoever_waited_goes_on_where_a_killed_one_ended(hub: FakeHub, tmp_path: Path) -> None:
    hub.slow = 0.05
    with started(hub, tmp_path / "cache") as first:
        until(lambda: received(tmp_path / "cache") > MEGABYTE)
        thread = threading.Thread(target=fetched, args=(hub, tmp_path / "cache"), kwargs={"commit": COMMIT})
        thread.start()
        first.kill()
    hub.slow = 0.0
    thread.join()
    assert is_whole(HubCache(tmp_path / "cache", MODEL).snapshot(COMMIT))
    assert hub.sent[WEIGHTS] < SIZE + MEGABYTE


def test_the_token_goes_to_the_hub_alone(hub: FakeHub, tmp_path: Path) -> None:
    hub.token = "hf_secret"
    one = wanted(hub, tmp_path / "cache", token="hf_secret")
    assert is_whole(fetch(one, resolve(one)).folder)
    assert {given for host, given in hub.tokens if host == "127.0.0.1"} == {"Bearer hf_secret"}
    assert {given for host, given in hub.tokens if host == "localhost"} == {""}  # where the weights are


@pytest.mark.parametrize(
    ("token", "gated", "words"),
    [
        (False, False, r"refuses org/model \(401\)"),
        ("hf_wrong", False, r"refuses org/model \(401\).*check the token"),
        ("hf_secret", True, "org/model is gated: ask for access"),
    ],
)
def test_who_may_not_see_it_is_told(hub: FakeHub, tmp_path: Path, token: str | bool, gated: bool, words: str) -> None:
    hub.token, hub.gated = "hf_secret", gated
    one = wanted(hub, tmp_path / "cache", token=token)
    with pytest.raises(ModelError, match=words) as caught:
        fetch(one, resolve(one))
    assert caught.value.kind is LoadFailure.PERMANENT
    assert "hf_" not in str(caught.value)


@pytest.mark.parametrize("headers", [{"Retry-After": "17"}, {"RateLimit": '"resolvers";r=0;t=17'}])
def test_when_the_hub_may_be_asked_again_is_known(hub: FakeHub, tmp_path: Path, headers: dict[str, str]) -> None:
    hub.failure = Failure(429, headers, where="/resolve/")
    with pytest.raises(ModelError, match=r"no more requests now \(429\).*after 17 s") as caught:
        fetched(hub, tmp_path / "cache")
    assert (caught.value.kind, caught.value.retry_after) == (LoadFailure.TRANSIENT, 17.0)


def test_a_hub_that_is_away_leaves_what_the_cache_has(
    hub: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fetched(hub, tmp_path / "cache")
    hub.failure = Failure(503)
    with caplog.at_level(logging.WARNING):
        assert fetched(hub, tmp_path / "cache").commit == COMMIT
    assert f"main is taken to be {COMMIT}" in caplog.text
    hub.failure = Failure(401, {"X-Error-Code": "RepoNotFound"})
    with pytest.raises(ModelError, match="401"):
        fetched(hub, tmp_path / "cache")


def test_a_hub_that_says_nothing_is_given_up_and_tried_again(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "READ_SECONDS", 0.3)
    hub.silent = 1.0
    with pytest.raises(ModelError, match=r"can't be reached: ReadTimeout") as caught:
        fetched(hub, tmp_path / "cache")
    assert caught.value.kind is LoadFailure.TRANSIENT


def on_a_small_disk(hub: FakeHub, cache: Path, megabytes: int, meanwhile: str = "true") -> str:
    """What a fetcher prints whose cache is on a file system of that size."""
    cache.mkdir()
    script = f'mount -t tmpfs -o size={megabytes}m none "$2" && {{ {{ {meanwhile}; }} & exec "$0" -c "$3" "$1" "$2"; }}'
    namespace = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    shell = ["sh", "-c", script, sys.executable, hub.url, str(cache), FETCHER]
    return subprocess.run([*namespace, *shell], capture_output=True, text=True, check=True, timeout=120).stdout


def test_a_disk_that_fills_up_meanwhile_is_told_and_what_came_is_kept(hub: FakeHub, tmp_path: Path) -> None:
    hub.slow = 0.02
    others = 'until find "$2" -name "*part" -size +500k | grep .; do sleep 0.1; done >&2; dd if=/dev/zero of="$2/full"'
    printed = on_a_small_disk(hub, tmp_path / "cache", megabytes=40, meanwhile=others)
    assert "transient: org/model can't be stored: " in printed
    assert "No space left on device" in printed


def test_a_disk_that_is_too_small_is_told_before_the_weights_come(hub: FakeHub, tmp_path: Path) -> None:
    printed = on_a_small_disk(hub, tmp_path / "cache", megabytes=18)
    assert "transient: org/model needs 0.0 GB more in" in printed
    assert "make room, or name another cache" in printed
    assert WEIGHTS not in hub.sent
