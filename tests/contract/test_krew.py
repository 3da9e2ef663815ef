"""The plugin in krew's form: a manifest that krew's own validator takes, and an archive whose program runs."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from dev.krew.__main__ import ARCHIVE, ROOT, build

URI = "https://releases.example/kubectl-lockstep.tar.gz"
VALIDATOR = ROOT / ".dev" / "bin" / "krew"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest; the archive is beside it."""
    return build(tmp_path_factory.mktemp("krew"), URI)


@pytest.fixture(scope="module")
def installed(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As krew installs it: unpacked in a folder of its own, with a link to the program elsewhere."""
    store, links = tmp_path_factory.mktemp("store"), tmp_path_factory.mktemp("bin")
    subprocess.run(["tar", "-xzf", made.with_name(ARCHIVE), "-C", store], check=True)
    link = links / "kubectl-lockstep"
    link.symlink_to(store / "kubectl-lockstep")
    return link


def verdict(manifest: Path) -> subprocess.CompletedProcess[str]:
    """Krew's own, as its index asks for it of every plugin."""
    command = [str(VALIDATOR), "-manifest", str(manifest), "-skip-install"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_krew_takes_the_manifest(made: Path, tmp_path: Path) -> None:
    judged = verdict(made)
    assert (judged.returncode, "structural validation OK" in judged.stderr) == (0, True), judged.stderr
    broken = tmp_path / made.name
    broken.write_text(made.read_text().replace("shortDescription", "shortDescriptoin"))
    assert verdict(broken).returncode != 0, "what isn't right is refused"


def test_the_manifest_is_of_the_archive(made: Path) -> None:
    spec: dict[str, Any] = yaml.safe_load(made.read_text())["spec"]
    digest = hashlib.sha256(made.with_name(ARCHIVE).read_bytes()).hexdigest()
    assert spec["platforms"]
    for platform in spec["platforms"]:
        assert (platform["uri"], platform["sha256"]) == (URI, digest)
        with tarfile.open(made.with_name(ARCHIVE)) as archive:
            assert archive.getmember(platform["bin"]).mode & 0o111


def test_the_archive_has_the_advice(installed: Path) -> None:
    [wheel] = installed.resolve().parent.glob("*.whl")
    names = subprocess.run(["python3", "-m", "zipfile", "-l", wheel], capture_output=True, text=True, check=True).stdout
    for name in ("troubleshooting.md", "inside/probe.py", "inside/streams.py", "cli.py"):
        assert f"lockstep_operator/plugin/{name}" in names


@pytest.mark.parametrize("runner", ["uv", "pipx"])
def test_the_program_hands_the_wheel_and_its_arguments_to_whoever_runs_it(
    runner: str, installed: Path, tmp_path: Path
) -> None:
    fake = tmp_path / runner
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": str(tmp_path)}
    told = subprocess.run(
        [sys.executable, installed, "status", "--output=json"], env=environment, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    said = told.stdout.splitlines()
    [package] = [word for word in said if word.startswith("lockstep[plugin] @ file://")]
    assert Path(package.partition("file://")[2]).exists()
    assert said[-3:] == ["kubectl-lockstep", "status", "--output=json"]


def test_without_a_runner_it_says_what_it_needs(installed: Path, tmp_path: Path) -> None:
    told = subprocess.run(
        [sys.executable, installed], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert (told.returncode, told.stderr) == (1, "kubectl lockstep needs uv or pipx to run: install one of them\n")
