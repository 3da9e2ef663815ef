"""The plugin in krew's form: what krew's own validation asks of a manifest, and an archive whose program runs."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from dev.krew.__main__ import ARCHIVE, build

URI = "https://releases.example/kubectl-lockstep.tar.gz"
PLATFORM_FIELDS = {"uri", "sha256", "selector", "files", "license", "bin"}
SPEC_FIELDS = {"version", "shortDescription", "description", "caveats", "homepage", "platforms"}


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


def test_the_manifest_is_one_that_krew_takes(made: Path) -> None:
    """As krew's internal/index/validation does (v1alpha2)."""
    document: dict[str, Any] = yaml.safe_load(made.read_text())
    assert (document["apiVersion"], document["kind"]) == ("krew.googlecontainertools.github.com/v1alpha2", "Plugin")
    assert made.stem == document["metadata"]["name"]
    assert re.fullmatch(r"[\w-]+", document["metadata"]["name"])
    spec = document["spec"]
    assert spec.keys() <= SPEC_FIELDS
    assert re.fullmatch(r"v\d+\.\d+\.\d+(-[0-9A-Za-z.-]+)?", spec["version"])
    assert spec["shortDescription"]
    assert "\n" not in spec["shortDescription"]
    digest = hashlib.sha256(made.with_name(ARCHIVE).read_bytes()).hexdigest()
    assert spec["platforms"]
    for platform in spec["platforms"]:
        assert platform.keys() <= PLATFORM_FIELDS
        assert (platform["uri"], platform["sha256"]) == (URI, digest)
        assert platform["selector"]["matchLabels"].keys() <= {"os", "arch"}
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
