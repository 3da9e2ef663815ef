"""A commit is checked as `make lint` checks it."""

from __future__ import annotations

import json
import subprocess

import yaml
from tests.support.chart import ROOT


def test_the_hooks_of_a_commit_run_what_make_lint_runs() -> None:
    printed = subprocess.run(["make", "-n", "lint"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    linted = [line.removesuffix(" .") for line in printed.stdout.splitlines() if line.startswith(".venv/bin/")]
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [one["repo"] for one in repositories] == ["local"]
    assert [hook["entry"] for hook in repositories[0]["hooks"]] == linted
    assert len(linted) >= 4


def test_the_development_container_makes_the_environment() -> None:
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    assert container["postCreateCommand"].startswith("make venv ")
    assert "." not in container["image"].split("/")[0].split(":")[0], "an image of a registry's default names no host"
