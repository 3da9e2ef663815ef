"""A newcomer's five commands, as README.md has them: from the installed chart to a model that was broken and healed."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from tests.support import kubectl
from tests.support.chart import ROOT
from tests.support.cluster_api import ClusterApi
from tests.support.cluster_model import OPERATOR_NAMESPACE, Model

COMMANDS: Final = re.compile(r"five commands.*?```console\n(.*?)```", re.DOTALL)
IMAGE: Final = "$REGISTRY/runtime:0.1.0"
COMMAND_SECONDS: Final = 330.0


def commands() -> list[str]:
    """Without what they print."""
    found = COMMANDS.search((ROOT / "README.md").read_text())
    assert found is not None
    joined = found[1].replace("\\\n", "")
    return [line.removeprefix("$ ") for line in joined.splitlines() if line.startswith("$ ")]


@pytest.fixture
def kubeconfig(namespace: str, tmp_path: Path) -> Path:
    """The user's, in the test's namespace."""
    path = tmp_path / "kubeconfig"
    path.write_text(kubectl.KUBECONFIG.read_text())
    kubectl.kubectl("--kubeconfig", str(path), "config", "set-context", "--current", f"--namespace={namespace}")
    return path


@pytest.fixture
def model(api: ClusterApi, namespace: str) -> Iterator[Model]:
    yield (made := Model(api, namespace, "first-model"))
    made.delete()


def test_a_newcomer_sees_a_model_break_and_heal(api: ClusterApi, model: Model, kubeconfig: Path) -> None:
    install, apply, *others = commands()
    assert install.startswith("helm install lockstep charts/lockstep "), "the cluster's operator was installed so"
    assert len(others) == 3
    assert IMAGE in apply
    deployment = api.find("deployments", OPERATOR_NAMESPACE, "lockstep")
    assert deployment is not None
    variables = deployment["spec"]["template"]["spec"]["containers"][0]["env"]
    image = next(one["value"] for one in variables if one["name"] == "LOCKSTEP_RUNTIME_IMAGE")
    place = {**os.environ, "KUBECONFIG": str(kubeconfig), "PATH": f"{ROOT / '.dev/bin'}:{os.environ['PATH']}"}
    for command in (apply.replace(IMAGE, image), *others):
        ran = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", command],
            cwd=ROOT, env=place, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, f"{command}\n{ran.stdout}{ran.stderr}{model.explain()}"
    head, row = ran.stdout.splitlines()[-2:]
    assert " ".join(head.split()) == "NAME GROUPS READY AVAILABLE RANKS REASON RECOVERIES LAST FAULT AGE"
    assert row.split()[:8] == ["first-model", "1/1", "True", "True", "2/2", "Ready", "1", "RankLost"]
