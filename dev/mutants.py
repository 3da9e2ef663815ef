"""Does a test notice it when the pure modules are changed? Every small change of them is tried, in a copy of the tree.

`python -m dev.mutants [WORDS]` tries the modules whose names hold one of the words, or all. It prints what no test
noticed, and fails if that is anything but what `dev/mutants_equal.txt` lists: changes that change nothing, with why.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
COPY: Final = ROOT / "build" / "mutants"
EQUAL: Final = ROOT / "dev" / "mutants_equal.txt"
# In annotations, which nobody evaluates; and between enum members, which have an identity and no order.
CHANGE_NOTHING: Final = [
    "core/ReplaceBinaryOperator_BitOr_.*",
    "core/ReplaceComparisonOperator_Is_(Eq|NotEq|Lt|LtE|Gt|GtE)",
    "core/ReplaceComparisonOperator_IsNot_(Eq|NotEq|Lt|LtE|Gt|GtE)",
]
SECONDS: Final = 60.0  # for a mutant's tests; one that takes longer is noticed

RECOVERY: Final = "runtime/lockstep_runtime/recovery"
ENGINE: Final = "runtime/lockstep_runtime/engine"
LIFE: Final = (
    "tests/unit/test_coordinator.py tests/unit/test_coordinator_proof.py tests/unit/test_coordinator_poisoned.py "
    "tests/sim/test_coordinator_lives.py"
)
TESTS: Final = {
    f"{RECOVERY}/bounded.py": "tests/unit/test_engine_recovery.py",
    f"{RECOVERY}/diagnosis.py": "tests/unit/test_engine_recovery.py",
    f"{RECOVERY}/policy.py": "tests/unit/test_engine_recovery.py",
    f"{RECOVERY}/fault_log.py": "tests/unit/test_engine_recovery.py",
    f"{RECOVERY}/watchdog.py": "tests/unit/test_engine_deadline.py",
    f"{RECOVERY}/hang_attribution.py": "tests/unit/test_engine_suspect.py",
    f"{RECOVERY}/timing.py": LIFE,
    f"{RECOVERY}/cache_plan.py": LIFE,
    f"{RECOVERY}/verification.py": f"{LIFE} tests/unit/test_engine_suspect.py",
    f"{RECOVERY}/gathering.py": LIFE,
    f"{RECOVERY}/assembly.py": LIFE,
    f"{RECOVERY}/rank_handle.py": LIFE,
    f"{RECOVERY}/membership.py": LIFE,
    f"{RECOVERY}/coordinator.py": LIFE,
    f"{ENGINE}/blocks.py": "tests/unit/test_blocks.py",
    f"{ENGINE}/sequence.py": "tests/unit/test_scheduler.py",
    f"{ENGINE}/shares.py": "tests/unit/test_scheduler.py",
    f"{ENGINE}/scheduler.py": "tests/unit/test_scheduler.py",
    "runtime/lockstep_runtime/supervisor/state_machine.py": "tests/unit/test_supervisor_machine.py",
    "operator/lockstep_operator/decisions/rollout.py": "tests/unit/test_operator_rollout.py",
}


def main(words: list[str]) -> int:
    chosen = [module for module in TESTS if not words or any(word in module for word in words)]
    if COPY.exists():
        shutil.rmtree(COPY)
    for name in ("runtime", "operator", "tests", "examples", "pyproject.toml"):
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        COPY.mkdir(parents=True, exist_ok=True)
        copy(source, COPY / name)
    alive = [line for module in chosen for line in survivors(module)]
    known = {line.split("  # ")[0].strip() for line in EQUAL.read_text().splitlines() if line.strip()}
    for line in alive:
        print(("equal: " if line in known else "ALIVE: ") + line)
    return int(any(line not in known for line in alive))


def survivors(module: str) -> Iterator[str]:
    """`file: operator of the mutation: the line as it is => as it became`, of each change that no test noticed."""
    session = COPY / "session.sqlite"
    session.unlink(missing_ok=True)
    command = f"{sys.executable} -m pytest -q -x -p no:cacheprovider {TESTS[module]}"
    (COPY / "mutants.toml").write_text(
        f'[cosmic-ray]\nmodule-path = "{module}"\ntimeout = {SECONDS}\nexcluded-modules = []\n'
        f'test-command = "{command}"\n[cosmic-ray.distributor]\nname = "local"\n'
        f"[cosmic-ray.filters.operators-filter]\nexclude-operators = {json.dumps(CHANGE_NOTHING)}\n"
    )
    environment = {**os.environ, "PYTHONPATH": "runtime:operator:."}
    for name, arguments in (
        ("cosmic-ray", ["init", "mutants.toml", session.name]),
        ("cr-filter-operators", [session.name, "mutants.toml"]),
        ("cosmic-ray", ["exec", "mutants.toml", session.name]),
    ):
        subprocess.run([Path(sys.executable).with_name(name), *arguments], cwd=COPY, env=environment, check=True)
    with sqlite3.connect(session) as database:
        rows = database.execute(
            "select m.operator_name, m.start_pos_row, r.diff from mutation_specs m join work_results r "
            "on m.job_id = r.job_id where upper(r.test_outcome) like '%SURVIVED' order by m.start_pos_row"
        ).fetchall()
        (tried,) = database.execute("select count(*) from work_results where worker_outcome != 'SKIPPED'").fetchone()
    print(f"{module}: {tried} mutants, {len(rows)} alive", flush=True)
    for operator, _, diff in rows:
        change = _change(diff)
        # How a dataclass is stored, and `*` in a signature, which is no multiplication, change no result.
        if not change.startswith("@dataclass(") and not (change.startswith("def ") and "BinaryOperator" in operator):
            yield f"{module}: {operator.removeprefix('core/')}: {change}"


def _change(diff: str) -> str:
    """The changed line, before and after."""
    lines = [line for line in diff.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    before = " ".join(line[1:].strip() for line in lines if line[0] == "-")
    after = " ".join(line[1:].strip() for line in lines if line[0] == "+")
    return f"{before} => {after}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
