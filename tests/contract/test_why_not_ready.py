"""Whatever keeps a leader from taking requests is the group's state, in its own words, until it is mended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from tests.support.api_server import TINY_CHAT
from tests.support.live_engine import LiveEngine, live_engine

from lockstep_runtime.api import keys, loading
from lockstep_runtime.api.app import create_app
from lockstep_runtime.api.keys import ApiKeys
from lockstep_runtime.api.model import Problem
from lockstep_runtime.config import ReasoningParser
from lockstep_runtime.engine import main as engine_main
from lockstep_runtime.protocol.status import GroupState

NOBODY = 65532
TEXT_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return change


def closed(name: str) -> Callable[[Path], None]:
    """Nobody has a right to it; empty: to the folder itself."""
    return lambda folder: (folder / name).chmod(0)


def in_its_place(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


# For every problem: what brings it about, and words that the status has then.
FAULTS: dict[Problem, list[tuple[Callable[[Path], None], str]]] = {
    Problem.MODEL_NOT_FOUND: [
        (shutil.rmtree, "does not exist"),
        (closed(""), "Permission denied: user"),
    ],
    Problem.NO_TOKENIZER: [(lambda folder: (folder / "tokenizer.json").unlink(), "The model has no tokenizer.json")],
    Problem.TOKENIZER_UNREADABLE: [
        (in_its_place("tokenizer.json"), "tokenizer.json is a folder"),
        (closed("tokenizer.json"), "tokenizer.json; give it the right to"),
        (write("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
    ],
    Problem.TOKENIZER_UNUSABLE: [
        (write("tokenizer.json", b"{"), "tokenizer.json can't be used"),
        (write("tokenizer.json", b'{"model": {"type": "Unheard"}}'), "tokenizer.json can't be used"),
    ],
    Problem.SETTINGS_UNREADABLE: [
        (write("config.json", b"{"), "config.json is not valid JSON"),
        (closed("config.json"), "config.json; give it the right to"),
        (write("generation_config.json", b"[]"), "generation_config.json should hold a JSON object"),
        (write("tokenizer_config.json", b"caf\xe9"), "tokenizer_config.json is not UTF-8"),
    ],
    Problem.TEMPLATE_UNREADABLE: [
        (write("chat_template.jinja", b"caf\xe9"), "Latin-1, perhaps"),
        (write("chat_template.jinja", b"\xef\xbb\xbfa"), "byte order mark"),
        (in_its_place("chat_template.jinja"), "chat_template.jinja is a folder"),
    ],
    Problem.TEMPLATE_MALFORMED: [
        (write("chat_template.jinja", b"{% for m in messages %}\n{{ m.content }\n{% endfor %}"), "malformed in line 2"),
    ],
    # JSON takes half a character, and the tokenizer's binding does not
    Problem.UNEXPECTED: [(write("tokenizer_config.json", b'{"eos_token": "\\ud800"}'), "UnicodeEncodeError")],
}


def test_no_problem_is_forgotten() -> None:
    assert {*FAULTS, Problem.PARSER_UNFIT} == set(Problem)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A model that every user may read, where pytest's own folders are for its user alone."""
    top = Path(tempfile.mkdtemp(prefix="lockstep-why-not-"))
    top.chmod(0o777)
    mend(top / "m")
    with another_user():
        yield top / "m"
    shutil.rmtree(top)


@contextlib.contextmanager
def another_user() -> Iterator[None]:
    """Rights bind everybody but root."""
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if was_root:
            os.seteuid(0)


@contextlib.contextmanager
def owner() -> Iterator[None]:
    user = os.geteuid()
    if os.getuid() == 0:
        os.seteuid(0)
    try:
        yield
    finally:
        os.seteuid(user)


def mend(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in TEXT_FILES:
        shutil.copy(TINY_CHAT / name, folder)


@contextlib.asynccontextmanager
async def leader(
    model: Path | str,
    api_keys: ApiKeys | None = None,
    download_dir: str | None = None,
    reasoning_parser: ReasoningParser = "auto",
) -> AsyncIterator[LiveEngine]:
    """A group that has formed, with the api and the reader of the configuration beside it."""
    async with live_engine(model=str(model), download_dir=download_dir, reasoning_parser=reasoning_parser) as live:
        app = create_app(live.config, live.engine, api_keys or ApiKeys(None, None))
        reading = asyncio.create_task(engine_main.read_model(live.config, live.engine))
        async with app.router.lifespan_context(app):
            yield live
        reading.cancel()


@pytest.mark.parametrize(
    ("problem", "bring_about", "words"),
    [(problem, *fault) for problem, faults in FAULTS.items() for fault in faults],
)
async def test_what_keeps_a_leader_from_serving_is_the_groups_state(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    problem: Problem,
    bring_about: Callable[[Path], None],
    words: str,
) -> None:
    monkeypatch.setattr(loading, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(engine_main, "MODEL_RETRY_SECONDS", (0.05,))
    with owner():
        bring_about(folder)
    async with leader(folder) as live:
        await live.until(lambda: live.engine.status().state is GroupState.FAILED, f"{problem} is told")
        await live.until(lambda: words in live.engine.status().message, words)
        assert live.reports[-1].accepting is False or not live.engine.readiness().ready
        await live.until(lambda: words in live.reports[-1].message, "the supervisor has it")
        assert live.engine.status().may_pass is False, "none of these mends itself"
        with owner():
            mend(folder)
        await live.ready()
        assert live.engine.readiness().ready


async def test_a_parser_that_does_not_fit_the_tokenizer_is_told() -> None:
    async with leader(TINY_CHAT, reasoning_parser="qwen3") as live:
        words = "--reasoning-parser qwen3 needs the tokens <think> and </think>, which the tokenizer lacks"
        await live.until(lambda: words in live.engine.status().message, words)
        assert (live.engine.status().state, live.engine.status().may_pass) == (GroupState.FAILED, False)


async def test_keys_and_tokenizer_are_told_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(keys, "LOOK_SECONDS", 0.05)
    file = folder.parent / "keys"
    with owner():
        (folder / "tokenizer.json").unlink()
        file.touch()
        file.chmod(0)
    async with leader(folder, ApiKeys(None, file)) as live:

        async def say(*words: str) -> None:
            await live.until(lambda: all(one in live.engine.status().message for one in words), str(words))
            status = live.engine.status()
            assert (status.state, status.accepting, status.may_pass) == (GroupState.FAILED, False, False)

        await say(f"may not read {file}; give it the right to", "The model has no tokenizer.json")
        with owner():
            file.chmod(0o644)
        await say("The model has no tokenizer.json", f"{file} holds no API key")
        with owner():
            mend(folder)
        await say(f"{file} holds no API key")
        with owner():
            file.write_text("secret")
        await live.ready()
        assert live.engine.status().accepting
        with owner():
            file.write_text("")
        await say(f"{file} holds no API key")


async def test_a_hub_that_is_away_may_come_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and never listens
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        async with leader("org/model", download_dir=str(tmp_path)) as live:
            await live.until(lambda: "can't be reached" in live.engine.status().message, "it is told")
            status = live.engine.status()
            assert (status.state, status.may_pass) == (GroupState.FAILED, True)


async def test_until_the_text_files_are_read_a_formed_group_is_loading() -> None:
    async with live_engine() as live:
        live.engine.set_serving_blocker("the tokenizer is being read", loading=True)
        status = live.engine.status()
        assert (status.state, status.accepting) == (GroupState.LOADING, False)
        assert "the tokenizer is being read" in status.message
        live.engine.set_serving_blocker("")
        await live.ready()
