"""`make test`: every test that needs no GPU, one phase after the other, and where the time went.

Runs on any Python 3, before there is a virtual environment. A phase that fails doesn't hide what the others would say:
only those that need it are left out. A cluster that this brought up it takes down again, whatever happens; with CI in
the environment also .dev (binaries and images, 10 GB), since nobody comes back to a CI's checkout.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]
DEV = ROOT / ".dev"
CONFIG = DEV / "kubeconfig"


@dataclass(frozen=True)
class Phase:
    """One make target; it is left out when one that it needs failed or was left out.

    An early one is begun before all others and waited for in its turn: it waits for the network while they compute.
    """

    target: str
    needs: tuple[str, ...] = ()
    early: bool = False


PHASES = (
    Phase("venv"),
    Phase("lint", ("venv",)),
    Phase("images", early=True),
    Phase("test-unit", ("venv",)),
    Phase("deploy", ("images",)),
    Phase("test-e2e", ("venv", "deploy")),
)


@dataclass(frozen=True)
class Outcome:
    target: str
    word: str  # passed, failed or left out
    seconds: float


class InterruptedRunError(Exception):
    """SIGTERM or SIGINT: what was brought up must still be taken down."""


class Running:
    """A make target that was begun."""

    def __init__(self, target: str) -> None:
        print(f"\n=== make {target}", flush=True)
        self._target, self._began = target, time.monotonic()
        self._process = subprocess.Popen(["make", "--no-print-directory", target], cwd=ROOT)

    def wait(self) -> Outcome:
        code = self._process.wait()
        return Outcome(self._target, "failed" if code else "passed", time.monotonic() - self._began)

    def end(self) -> None:
        self._process.terminate()
        self._process.wait()


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    began, had_cluster = time.monotonic(), cluster_answers()
    outcomes: list[Outcome] = []
    running: dict[str, Running] = {}
    try:
        running |= {phase.target: Running(phase.target) for phase in PHASES if phase.early}
        for phase in PHASES:
            outcomes.append(run(phase, outcomes, running))
    except InterruptedRunError:
        for begun in running.values():
            begun.end()
        outcomes.append(Outcome("interrupted", "failed", 0.0))
    finally:
        if not had_cluster:
            outcomes.append(Running("clean-cluster" if os.environ.get("CI") else "cluster-down").wait())
    return report(outcomes, time.monotonic() - began)


def cluster_answers() -> bool:
    """Whether somebody's cluster is up already: it stays up, and tests use it."""
    kubectl = shutil.which("kubectl", path=f"{DEV / 'bin'}:{os.environ.get('PATH', '')}")
    if not CONFIG.exists() or kubectl is None:
        return False
    command = [kubectl, f"--kubeconfig={CONFIG}", "get", "--raw", "/readyz", "--request-timeout=5s"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def run(phase: Phase, before: list[Outcome], running: dict[str, Running]) -> Outcome:
    passed = {outcome.target for outcome in before if outcome.word == "passed"}
    if not passed.issuperset(phase.needs):
        return Outcome(phase.target, "left out", 0.0)
    if phase.target not in running:
        running[phase.target] = Running(phase.target)
    outcome = running[phase.target].wait()
    del running[phase.target]
    return outcome


def report(outcomes: list[Outcome], seconds: float) -> int:
    print("\n=== summary")
    for outcome in outcomes:
        print(f"{outcome.target:<14} {outcome.seconds:7.0f} s  {outcome.word}")
    print(f"{'all of it':<14} {seconds:7.0f} s", flush=True)
    return 0 if all(outcome.word == "passed" for outcome in outcomes) else 1


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise InterruptedRunError(signal.Signals(number).name)


if __name__ == "__main__":
    sys.exit(main())
