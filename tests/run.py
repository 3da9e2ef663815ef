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
    """One make target; it is left out when one that it needs failed or was left out."""

    target: str
    needs: tuple[str, ...] = ()


PHASES = (
    Phase("venv"),
    Phase("lint", ("venv",)),
    Phase("images", ("venv",)),
    Phase("test-unit", ("venv",)),
    Phase("deploy", ("images",)),
    Phase("test-e2e", ("deploy",)),
)


@dataclass(frozen=True)
class Outcome:
    target: str
    word: str  # passed, failed or left out
    seconds: float


class InterruptedRunError(Exception):
    """SIGTERM or SIGINT: what was brought up must still be taken down."""


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    had_cluster = cluster_answers()
    outcomes: list[Outcome] = []
    try:
        for phase in PHASES:
            outcomes.append(run(phase, outcomes))
    except InterruptedRunError:
        outcomes.append(Outcome("interrupted", "failed", 0.0))
    finally:
        if not had_cluster:
            outcomes.append(run(Phase("clean-cluster" if os.environ.get("CI") else "cluster-down"), []))
    return report(outcomes)


def cluster_answers() -> bool:
    """Whether somebody's cluster is up already: it stays up, and tests use it."""
    if not CONFIG.exists() or shutil.which("kubectl") is None:
        return False
    command = ["kubectl", f"--kubeconfig={CONFIG}", "get", "--raw", "/readyz", "--request-timeout=5s"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def run(phase: Phase, before: list[Outcome]) -> Outcome:
    passed = {outcome.target for outcome in before if outcome.word == "passed"}
    if not passed.issuperset(phase.needs):
        return Outcome(phase.target, "left out", 0.0)
    print(f"\n=== make {phase.target}", flush=True)
    began = time.monotonic()
    code = subprocess.run(["make", "--no-print-directory", phase.target], cwd=ROOT, check=False).returncode
    return Outcome(phase.target, "failed" if code else "passed", time.monotonic() - began)


def report(outcomes: list[Outcome]) -> int:
    print("\n=== summary")
    for outcome in outcomes:
        print(f"{outcome.target:<14} {outcome.seconds:7.0f} s  {outcome.word}")
    print(f"{'together':<14} {sum(outcome.seconds for outcome in outcomes):7.0f} s", flush=True)
    return 0 if all(outcome.word == "passed" for outcome in outcomes) else 1


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise InterruptedRunError(signal.Signals(number).name)


if __name__ == "__main__":
    sys.exit(main())
