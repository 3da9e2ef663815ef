"""What only a GPU can show: each check in a process of its own, then the tests of tests/gpu, all within ten minutes.

    python -m tests.gpu.findings [NAME …]

Prints a table: what was expected, whether it was so, and the numbers. `finding` names the point of the desk check that
was made without a GPU: what it claims of torch and CUDA is confirmed or refuted; what the code was changed to do holds
or fails, which fails the run.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parents[1]
BUDGET_SECONDS: Final = 600.0
PYTEST_SECONDS: Final = 240.0  # at least, if that much is left
ANSWER: Final = "findings: "  # begins the line in which a check answers
TAIL_CHARACTERS: Final = 1500  # of a check that failed
SERVING: Final = (
    "fastapi",
    "uvicorn",
    "httpx",
    "setproctitle",
    "prometheus_client",
    "tokenizers",
    "jinja2",
    "pydantic",
)
GOOD: Final = ("confirmed", "refuted", "holds", "measured")


@dataclass(frozen=True, slots=True)
class Row:
    finding: str
    expected: str
    verdict: str  # one of GOOD, or: fails, error, left out
    numbers: str


@dataclass(frozen=True, slots=True)
class Check:
    name: str  # of a module of tests/gpu/checks
    command: tuple[str, ...]
    seconds: float


def checks(names: Sequence[str]) -> list[Check]:
    """In the order of what is most worth knowing."""
    seconds = {"attention": 60, "nccl": 60, "abort": 40, "release": 60, "exported": 40, "steps": 90, "captured": 60}
    return [
        Check(name, (sys.executable, "-m", f"tests.gpu.checks.{name}"), limit)
        for name, limit in seconds.items()
        if not names or name in names
    ]


def run_check(check: Check, left: float) -> list[Row]:
    """Its rows, or one that says what became of it."""
    if left < 1:
        return [Row(check.name, "", "left out", "the ten minutes are over")]
    try:
        done = subprocess.run(
            check.command, cwd=ROOT, capture_output=True, text=True, timeout=min(check.seconds, left), check=False
        )
    except subprocess.TimeoutExpired as error:
        return [Row(check.name, "", "error", f"did not end within {error.timeout:.0f} s")]
    answers = [line.removeprefix(ANSWER) for line in done.stdout.splitlines() if line.startswith(ANSWER)]
    rows = [Row(*row) for answer in answers for row in json.loads(answer)]
    if done.returncode or not rows:
        print((done.stdout + done.stderr)[-TAIL_CHARACTERS:], flush=True)
        rows.append(Row(check.name, "", "error", f"ended with {done.returncode}; its output is above"))
    return rows


def answer(rows: Sequence[Row]) -> None:
    """By a check, to whoever started it."""
    print(ANSWER + json.dumps([[row.finding, row.expected, row.verdict, row.numbers] for row in rows]), flush=True)


def table(rows: Sequence[Row]) -> str:
    head = Row("finding", "expected", "verdict", "numbers")
    lines = [_cells(row) for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, cells, widths)).rstrip() for cells in lines)


def _cells(row: Row) -> tuple[str, ...]:
    return row.finding, row.expected, row.verdict, row.numbers


def exit_code(rows: Sequence[Row], tests: int) -> int:
    return tests or int(any(row.verdict not in GOOD for row in rows))


def run_tests(left: float) -> int:
    """pytest's exit code. What can't be imported is left out, and said."""
    if left < 1:
        print("tests/gpu: left out, the ten minutes are over")
        return 1
    command = [sys.executable, "-m", "pytest", "-c", str(HERE / "pytest.ini"), f"--rootdir={ROOT}", str(HERE)]
    if missing := [name for name in SERVING if importlib.util.find_spec(name) is None]:
        print(f"tests/gpu/test_served.py is left out: {', '.join(missing)} can't be imported")
        command.append(f"--ignore={HERE / 'test_served.py'}")
    try:
        return subprocess.run(command, cwd=ROOT, timeout=left, check=False).returncode
    except subprocess.TimeoutExpired:
        print("tests/gpu: the ten minutes are over")
        return 1


def main(names: Sequence[str]) -> int:
    from tests.support.gpu import why_not

    if reason := why_not():
        print(f"Nothing can be shown here: {reason}.")
        return 0
    end = time.monotonic() + BUDGET_SECONDS
    rows: list[Row] = []
    for check in checks(names):
        left = end - time.monotonic() - (0 if names else PYTEST_SECONDS)
        found = run_check(check, left)
        print(table(found), flush=True)
        rows += found
    tests = 0 if names else run_tests(end - time.monotonic())
    print(f"\n{table(rows)}\n\ntests/gpu: {'not run' if names else f'pytest ended with {tests}'}")
    return exit_code(rows, tests)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
