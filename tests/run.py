"""`make test`: every test that needs no GPU, and where the time went.

Runs on any Python 3, before there is a virtual environment. What doesn't disturb each other runs at the same time; what
is shown is one phase after the other. A phase that fails doesn't hide what the others would say: only those that need
it are left out. A cluster that this brought up it takes down again, whatever happens; with CI in the environment also
.dev (binaries and images, 10 GB), since nobody comes back to a CI's checkout.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import BinaryIO

ROOT = Path(__file__).resolve().parents[1]
DEV = ROOT / ".dev"
CONFIG = DEV / "kubeconfig"
LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class Phase:
    """One make target. It is left out when one that it needs failed or was left out, and begins after all it names."""

    target: str
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    gives_way: bool = False  # to what runs at the same time and waits for other machines' clocks


PHASES = (
    Phase("venv"),
    Phase("lint", needs=("venv",)),
    Phase("test-unit", needs=("venv",), after=("lint",), gives_way=True),
    Phase("coverage-pure", needs=("venv",), after=("test-unit",), gives_way=True),
    Phase("images"),
    Phase("deploy", needs=("images",)),
    Phase("test-e2e", needs=("venv", "deploy")),
    Phase("test-chaos", needs=("venv",), after=("lint", "images")),  # on a fresh machine everything waits for those
    Phase("test-contract", needs=("venv",), after=("test-chaos", "images")),  # the chart's tests want Helm, too
    Phase("test-clients", needs=("venv",), after=("test-contract",)),
)


@dataclass(frozen=True)
class Outcome:
    target: str
    word: str  # passed, failed or left out
    seconds: float


class InterruptedRunError(Exception):
    """SIGTERM or SIGINT: what was brought up must still be taken down."""


class Running:
    """A make target that was begun; what it prints waits in a file."""

    def __init__(self, phase: Phase) -> None:
        self._target, self._began = phase.target, time.monotonic()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - closed when this object goes
        command = [*(["nice", "-n", "5"] if phase.gives_way else []), "make", "--no-print-directory", phase.target]
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=self._output, stderr=subprocess.STDOUT)
        self._shown = 0

    def outcome(self) -> Outcome | None:
        code = self._process.poll()
        if code is None:
            return None
        return Outcome(self._target, "failed" if code else "passed", time.monotonic() - self._began)

    def show(self) -> None:
        """What it has printed since the last time."""
        self._shown += _copy(self._output, self._shown)

    def end(self) -> None:
        self._process.terminate()
        self._process.wait()
        self.show()


class Run:
    """All phases: which run, and how the others ended."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Outcome] = {}
        self._running: dict[str, Running] = {}
        self._ended: dict[str, Running] = {}

    def follow(self, phase: Phase) -> None:
        """Show the phase until it has ended, while the others go on."""
        print(f"\n=== make {phase.target}", flush=True)
        while phase.target not in self.outcomes:
            self._advance()
            if phase.target in self._running:
                self._running[phase.target].show()
            time.sleep(LOOK_SECONDS)
        if phase.target in self._ended:
            self._ended[phase.target].show()

    def end(self) -> None:
        for running in self._running.values():
            running.end()

    def _advance(self) -> None:
        for target, running in list(self._running.items()):
            if (outcome := running.outcome()) is not None:
                self.outcomes[target] = outcome
                self._ended[target] = self._running.pop(target)
        for phase in PHASES:
            if phase.target not in self._running and phase.target not in self.outcomes:
                self._begin(phase)

    def _begin(self, phase: Phase) -> None:
        if not self.outcomes.keys() >= {*phase.needs, *phase.after}:
            return
        if all(self.outcomes[need].word == "passed" for need in phase.needs):
            self._running[phase.target] = Running(phase)
        else:
            self.outcomes[phase.target] = Outcome(phase.target, "left out", 0.0)


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    began, had_cluster = time.monotonic(), cluster_answers()
    run, last = Run(), []
    try:
        for phase in PHASES:
            run.follow(phase)
    except InterruptedRunError:
        run.end()
        last.append(Outcome("interrupted", "failed", 0.0))
    finally:
        if not had_cluster:
            last.append(take_down("clean-cluster" if os.environ.get("CI") else "cluster-down"))
    return report([*run.outcomes.values(), *last], time.monotonic() - began)


def cluster_answers() -> bool:
    """Whether somebody's cluster is up already: it stays up, and tests use it."""
    kubectl = shutil.which("kubectl", path=f"{DEV / 'bin'}:{os.environ.get('PATH', '')}")
    if not CONFIG.exists() or kubectl is None:
        return False
    command = [kubectl, f"--kubeconfig={CONFIG}", "get", "--raw", "/readyz", "--request-timeout=5s"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def take_down(target: str) -> Outcome:
    print(f"\n=== make {target}", flush=True)
    began = time.monotonic()
    code = subprocess.run(["make", "--no-print-directory", target], cwd=ROOT, check=False).returncode
    return Outcome(target, "failed" if code else "passed", time.monotonic() - began)


def report(outcomes: list[Outcome], seconds: float) -> int:
    print("\n=== summary")
    for outcome in outcomes:
        print(f"{outcome.target:<14} {outcome.seconds:7.0f} s  {outcome.word}")
    print(f"{'all of it':<14} {seconds:7.0f} s", flush=True)
    return 0 if all(outcome.word == "passed" for outcome in outcomes) else 1


def _copy(source: BinaryIO, start: int) -> int:
    """To standard output, what a file has from `start` on; returns how many bytes. Its writer's place is kept."""
    found = 0
    while piece := os.pread(source.fileno(), 65536, start + found):
        sys.stdout.buffer.write(piece)
        found += len(piece)
    sys.stdout.flush()
    return found


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise InterruptedRunError(signal.Signals(number).name)


if __name__ == "__main__":
    sys.exit(main())
