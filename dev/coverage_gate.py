"""Is enough of the code covered? Reads coverage's data; `make coverage` measures it, branches included.

The pure modules are those that import-linter keeps from waiting and from clocks: every line and branch of them. Each of
the packages has a floor: what the tests reach in their own processes, since what only a rank's process runs is
measured by nobody (its tests are tests/chaos, tests/contract and tests/e2e).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
CONTRACT: Final = "What decides neither waits nor reads a clock"
FLOORS: Final = {"lockstep_operator": 90.0, "lockstep_runtime": 90.0}  # percent of lines and branches


def pure_modules() -> list[str]:
    """By their dotted names."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    [contract] = [one for one in settings["contracts"] if one["name"] == CONTRACT]
    return list(contract["source_modules"])


def measured() -> dict[str, Mapping[str, Any]]:
    """Coverage's own report on every file, by dotted names."""
    report = ROOT / "build" / "coverage" / "report.json"
    command = [sys.executable, "-m", "coverage", "json", "--quiet", "-o", str(report)]
    subprocess.run(command, cwd=ROOT, check=True)
    files = json.loads(report.read_text())["files"]
    return {".".join(Path(path).with_suffix("").parts[1:]): found for path, found in files.items()}


def percent(found: Iterable[Mapping[str, Any]]) -> float:
    """Of lines and branches together."""
    sums = [one["summary"] for one in found]
    covered = sum(one["covered_lines"] + one["covered_branches"] for one in sums)
    whole = sum(one["num_statements"] + one["num_branches"] for one in sums)
    return 100.0 * covered / whole if whole else 100.0


def missing(name: str, found: Mapping[str, Any]) -> str:
    """What of a module no test reaches; empty if nothing."""
    lines = [str(line) for line in found["missing_lines"]]
    branches = [f"{start}→{'exit' if end < 0 else end}" for start, end in found["missing_branches"]]
    return f"{name}: {', '.join([*lines, *branches])}" if lines or branches else ""


def problems(files: Mapping[str, Mapping[str, Any]], pure: Iterable[str], floors: Mapping[str, float]) -> list[str]:
    """One line for each module and package that is not covered as it should be."""
    found = [missing(name, files[name]) if name in files else f"{name}: not measured" for name in pure]
    for package, floor in floors.items():
        reached = percent(one for name, one in files.items() if name.startswith(f"{package}."))
        if reached < floor:
            found.append(f"{package}: {reached:.1f} %, below {floor:g} %")
    return [one for one in found if one]


def main() -> int:
    """`--pure`: the pure modules alone."""
    files = measured()
    rooms = sorted({".".join(name.split(".")[:2]) for name in files})
    for room in rooms:
        reached = percent(one for name, one in files.items() if f"{name}.".startswith(f"{room}."))
        print(f"{reached:6.1f} %  {room}")
    found = problems(files, pure_modules(), {} if "--pure" in sys.argv else FLOORS)
    print("\n".join(found) or "every pure module is covered, and the packages are at their floors or above")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
