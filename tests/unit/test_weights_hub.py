"""What a hub and a proxy answer is one sentence each, with what to do, and whether to try again."""

from __future__ import annotations

import errno
import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.api_server import TINY_CHAT
from tests.support.fake_hub import COMMIT, Failure, FakeHub, fake_hub, fresh_client

from lockstep_runtime.protocol.bus import LoadFailure
from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.sources.hub_errors import SLOW_RETRY_SECONDS, explain
from lockstep_runtime.sources.model_folder import find_model, read_config
from lockstep_runtime.worker.fault_classifier import load_failure

MODEL = "org/model"
PERMANENT, TRANSIENT = LoadFailure.PERMANENT, LoadFailure.TRANSIENT


@pytest.fixture(autouse=True)
def own_client(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with fresh_client(monkeypatch):
        yield


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    folder = tmp_path / "repository"
    shutil.copytree(TINY_CHAT, folder)
    with fake_hub(folder) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def found(tmp_path: Path, model: str = MODEL, revision: str | None = None) -> Path:
    return find_model(model, revision, str(tmp_path / "cache"))


def refused(tmp_path: Path, model: str = MODEL, words: str | None = None) -> ModelError:
    with pytest.raises(ModelError, match=words) as caught:
        found(tmp_path, model)
    assert load_failure(caught.value) is caught.value.kind
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_model_is_downloaded_its_weights_last(hub: FakeHub, tmp_path: Path) -> None:
    folder = found(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in TINY_CHAT.iterdir())
    files = [path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path]
    assert files[-1] == "model.safetensors"


def test_weights_that_nobody_reads_are_not_fetched(hub: FakeHub, tmp_path: Path) -> None:
    kept, unread = "additional_chat_templates/tools.jinja", ("README.md", "training_args.json", "extra/chat.jinja")
    others = ("consolidated.safetensors", "original/model.safetensors", "pytorch_model.bin", "model-1-of-2.safetensors")
    for name in (kept, *unread, *others):
        (hub.folder / name).parent.mkdir(exist_ok=True)
        (hub.folder / name).write_bytes(b"x")
    folder = found(tmp_path)
    fetched = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    assert fetched == {path.name for path in TINY_CHAT.iterdir()} | {kept}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised \(gptq\)"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantised \(fp8\)"),
        ({"architectures": ["GPT2LMHeadModel"]}, "the architecture GPT2LMHeadModel"),
    ],
)
def test_what_can_not_be_served_is_told_before_its_weights_are_fetched(
    hub: FakeHub, tmp_path: Path, change: dict[str, object], words: str
) -> None:
    config = hub.folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ModelError, match=words):
        found(tmp_path)
    assert not [path for path in hub.asked if path.endswith(".safetensors")]


@pytest.mark.parametrize(
    ("failure", "words", "kind"),
    [
        (Failure(401, {"X-Error-Code": "RepoNotFound"}), r"refuses org/model \(401\).*check the token", PERMANENT),
        (Failure(401), r"refuses org/model \(401\)", PERMANENT),
        (Failure(403, {"X-Error-Code": "GatedRepo"}), "org/model is gated: ask for access", PERMANENT),
        (Failure(403, {"X-Error-Code": "GatedRepo"}, "model.safetensors"), "org/model is gated", PERMANENT),
        (Failure(403), r"refuses org/model \(403\)", PERMANENT),
        (Failure(404, {"X-Error-Code": "RepoNotFound"}), "has no model org/model, or not for this token", PERMANENT),
        (Failure(404, {"X-Error-Code": "RevisionNotFound"}), "org/model has no revision main", PERMANENT),
        (Failure(400), "refuses org/model: 400 Bad Request", PERMANENT),
        (Failure(429, {"Retry-After": "7"}), r"allows no more requests now \(429\).*after 7 s", TRANSIENT),
        (Failure(500), r"fails \(500\) and org/model is tried again", TRANSIENT),
        (Failure(502), r"fails \(502\)", TRANSIENT),
        (Failure(503), r"fails \(503\)", TRANSIENT),
        (Failure(504), r"fails \(504\)", TRANSIENT),
        (Failure(0), "can't be reached: ReadError: .*reset by peer", TRANSIENT),
        (Failure(0, {}, "model.safetensors"), "can't be reached: ReadError", TRANSIENT),
    ],
)  # fmt: skip
def test_what_the_hub_answers_is_a_sentence_until_it_answers_otherwise(
    hub: FakeHub, tmp_path: Path, failure: Failure, words: str, kind: LoadFailure
) -> None:
    hub.failure = failure
    error = refused(tmp_path, words=words)
    assert error.kind is kind
    slow = {429: 7.0}.get(failure.status, 0.0)
    assert error.retry_after == (SLOW_RETRY_SECONDS if kind is PERMANENT else slow)
    hub.failure = None
    assert read_config(found(tmp_path))["architectures"] == ["Qwen3ForCausalLM"]


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}", "http://no-such-host.invalid"])
def test_a_hub_that_can_not_be_reached_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and never listens
        monkeypatch.setenv("HF_ENDPOINT", url.format(port=unused.getsockname()[1]))
        error = refused(tmp_path)
    assert error.kind is TRANSIENT
    assert "org/model can't be downloaded now: http://" in str(error)
    assert "can't be reached: ConnectError" in str(error)


def test_a_download_that_was_cut_short_is_no_model_while_the_hub_is_away(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.failure = Failure(0, {}, "model.safetensors")
    refused(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://no-such-host.invalid")
    assert refused(tmp_path).kind is TRANSIENT
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    hub.failure = None
    whole = found(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://no-such-host.invalid")
    assert found(tmp_path) == whole


@pytest.mark.parametrize(
    ("endpoint", "status", "words", "kind"),
    [
        ("http://hub.invalid", 407, r"the proxy \(127.0.0.1:\d+\) needs a password \(407\)", PERMANENT),
        ("http://hub.invalid", 502, r"hub.invalid fails \(502\)", TRANSIENT),
        ("http://hub.invalid", 403, r"hub.invalid refuses org/model \(403\)", PERMANENT),
        ("https://hub.invalid", 407, r"the proxy \(127.0.0.1:\d+\) refuses: ProxyError: 407", TRANSIENT),
        ("https://hub.invalid", 403, r"the proxy \(127.0.0.1:\d+\) refuses: ProxyError: 403", TRANSIENT),
        ("https://hub.invalid", 503, r"the proxy \(127.0.0.1:\d+\) refuses: ProxyError: 503", TRANSIENT),
    ],
)
def test_what_a_proxy_answers_is_told_without_its_password(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str, status: int, words: str, kind: str
) -> None:
    hub.failure = Failure(status)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    proxy = hub.url.replace("http://", "http://user:secret@")
    monkeypatch.setenv("HTTP_PROXY", proxy)
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    error = refused(tmp_path, words=words)
    assert error.kind is kind
    assert "secret" not in str(error)


@pytest.mark.parametrize("name", ["org/mo del", "-model", "org/--"])
def test_what_is_neither_a_folder_nor_a_hub_id_is_said(tmp_path: Path, name: str) -> None:
    error = refused(tmp_path, name)
    assert error.kind is PERMANENT
    assert "neither a directory here nor a hub id" in str(error)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, TRANSIENT),
        (errno.EDQUOT, TRANSIENT),
        (errno.EIO, TRANSIENT),
        (errno.EROFS, PERMANENT),
        (errno.EACCES, PERMANENT),
        (errno.EPERM, PERMANENT),
    ],
)
def test_a_disk_that_refuses_a_download_is_named(number: int, kind: LoadFailure) -> None:
    error = explain(MODEL, None, OSError(number, "", "/cache/blobs/x.incomplete"), "https://hub")
    assert error.kind is kind
    assert str(error).startswith("org/model can't be stored: /cache/blobs/x.incomplete: ")
    assert ("write there, or name another cache" in str(error)) is (kind is PERMANENT)


def test_the_fake_answers_to_the_commit(hub: FakeHub, tmp_path: Path) -> None:
    assert found(tmp_path, revision=COMMIT).name == COMMIT
