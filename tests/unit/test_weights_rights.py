"""Folders and files that may not be read: a sentence with the path and the user; a person must give the rights."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.support.api_server import TINY_CHAT

NOBODY = 65532
# For each folder that is asked for, one line: what a process of another user is told.
SERVER = f"""
import os, sys
from lockstep_runtime.api.model import ModelUnavailableError, load
from lockstep_runtime.config import ServeConfig
from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.weights.checkpoint import Checkpoint
from lockstep_runtime.sources.model_folder import find_model, read_config
from lockstep_runtime.worker.fault_classifier import load_failure

def told(path):
    try:
        folder = find_model(path)
        read_config(folder)
        Checkpoint(folder)
        load(ServeConfig(model=path, served_name="m"))
        return "serves"
    except ModelUnavailableError as error:
        return f"{{'transient' if error.may_pass else 'permanent'}}: {{error}}"
    except ModelError as error:
        return f"{{load_failure(error)}}: {{error}}"

for line in sys.stdin:
    if not (child := os.fork()):
        os.setgroups([]), os.setgid({NOBODY}), os.setuid({NOBODY})
        print(told(line.strip()), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""

Look = Callable[[Path], str]


@pytest.fixture(scope="module")
def look() -> Iterator[Look]:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=pipe, stdout=pipe, text=True, env=environment
    ) as server:
        assert server.stdin
        assert server.stdout
        questions, answers = server.stdin, server.stdout

        def ask(folder: Path) -> str:
            questions.write(f"{folder}\n")
            questions.flush()
            assert select.select([answers], [], [], 60)[0], "no answer within 60 s"
            return answers.readline().strip()

        yield ask
        questions.close()
        server.wait(30)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A model that others may read, where pytest's own folders are for its user alone."""
    top = Path(tempfile.mkdtemp(prefix="lockstep-rights-"))
    folder = top / "outer" / "m"
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TINY_CHAT / name, folder / name)
    (folder / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"]}))
    save_file({"a": torch.zeros(2)}, folder / "model.safetensors")
    give_rights(folder)
    yield folder
    shutil.rmtree(top)


def give_rights(folder: Path) -> None:
    for path in (folder.parents[1], folder.parent, folder, *folder.iterdir()):
        path.chmod(0o755)


@pytest.mark.parametrize(
    ("close", "words"),
    [
        (lambda folder: folder.parent.chmod(0o700), "may not enter {folder.parent}, and so not read {folder}"),
        (lambda folder: folder.chmod(0o700), "may not read {folder}"),
        (lambda folder: folder.chmod(0o744), "may not enter {folder}, and so not read {folder}/config.json"),
        (lambda folder: (folder / "config.json").chmod(0o600), "may not read {folder}/config.json"),
        (lambda folder: (folder / "model.safetensors").chmod(0o600), "may not read {folder}/model.safetensors"),
        (lambda folder: (folder / "tokenizer.json").chmod(0o600), "may not read {folder}/tokenizer.json"),
        (lambda folder: (folder / "chat_template.jinja").chmod(0o600), "may not read {folder}/chat_template.jinja"),
    ],
)
def test_what_may_not_be_read_is_named_until_the_rights_are_given(
    look: Look, folder: Path, close: Callable[[Path], None], words: str
) -> None:
    assert look(folder) == "serves"
    close(folder)
    told = look(folder)
    assert f"Permission denied: user {NOBODY}" in told
    assert words.format(folder=folder) in told
    assert told.startswith("permanent: ")  # rights don't come back by themselves
    give_rights(folder)
    assert look(folder) == "serves"
