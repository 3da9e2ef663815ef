"""Does a test notice it when the pure modules are changed? Every small change is tried, in a process of its own.

`python -m dev.mutants [WORDS]` tries the modules whose names hold one of the words, or all. It prints what no test
noticed, and fails if that is anything but what `dev/mutants_equal.txt` lists: changes that change nothing, with why.
The files stay as they are: a changed module is in the memory of its process, a fork of one that has imported already
whatever isn't ours, so that most changes take a few tenths of a second.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.abc
import importlib.machinery
import os
import re
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import CodeType, ModuleType
from typing import Final

import cosmic_ray.plugins
import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

ROOT: Final = Path(__file__).resolve().parent.parent
EQUAL: Final = ROOT / "dev" / "mutants_equal.txt"
OURS: Final = ("lockstep_operator", "lockstep_runtime", "tests", "dev", "__main__", "__mp_main__")
# In annotations, which nobody evaluates; between enum members, which have an identity and no order; and what is as far
# off as other mutants of the same place are, or no operator of these types.
LEFT_OUT: Final = re.compile(
    "core/(ReplaceBinaryOperator_(BitOr_|.*_(BitAnd|BitOr|BitXor|LShift|RShift|Pow)$)"
    "|ReplaceComparisonOperator_(Is(Not)?_(Eq|NotEq|Lt|LtE|Gt|GtE)|(Eq|NotEq|Lt|LtE|Gt|GtE)_Is(Not)?)$)"
)
CONSTANT: Final = re.compile(r"[A-Z_]+: Final = (?![01] )")  # also within a tuple or a table's row
SECONDS: Final = 60.0  # for a mutant's tests; one that takes longer is noticed
BYTES: Final = 1 << 30  # of address space: one that fills the memory, too
OPTIONS: Final = (
    *("-q", "-x", "--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:hypothesispytest"),
    *("-W", "ignore::pytest.PytestAssertRewriteWarning"),  # of what was imported before the fork
)
SCHEDULES: Final = "300"  # random lives for each mutant

RECOVERY: Final = "runtime/lockstep_runtime/recovery"
ENGINE: Final = "runtime/lockstep_runtime/engine"
LIFE: Final = (
    "tests/unit/test_coordinator_details.py tests/unit/test_coordinator.py "
    "tests/unit/test_coordinator_proof.py tests/unit/test_coordinator_poisoned.py "
    "tests/sim/test_coordinator_lives.py"
)
TESTS: Final = {  # the cheap ones first: the first that fails ends a mutant
    f"{RECOVERY}/bounded.py": "tests/unit/test_recovery_policy.py",
    f"{RECOVERY}/diagnosis.py": "tests/unit/test_recovery_policy.py",
    f"{RECOVERY}/policy.py": "tests/unit/test_recovery_policy.py",
    f"{RECOVERY}/fault_log.py": "tests/unit/test_recovery_fault_log.py tests/unit/test_recovery_policy.py",
    f"{RECOVERY}/watchdog.py": "tests/unit/test_recovery_watchdog.py",
    f"{RECOVERY}/hang_attribution.py": "tests/unit/test_recovery_hang_attribution.py",
    f"{RECOVERY}/timing.py": f"tests/unit/test_recovery_timing.py {LIFE}",
    f"{RECOVERY}/cache_plan.py": f"tests/unit/test_recovery_cache_plan.py {LIFE}",
    f"{RECOVERY}/verification.py": (
        f"tests/unit/test_recovery_verification.py {LIFE} tests/unit/test_recovery_hang_attribution.py"
    ),
    f"{RECOVERY}/gathering.py": f"tests/unit/test_recovery_gathering.py {LIFE}",
    f"{RECOVERY}/assembly.py": f"tests/unit/test_recovery_assembly.py {LIFE}",
    f"{RECOVERY}/rank_handle.py": f"tests/unit/test_recovery_ranks.py {LIFE}",
    f"{RECOVERY}/membership.py": f"tests/unit/test_recovery_ranks.py {LIFE}",
    f"{RECOVERY}/coordinator.py": LIFE,
    f"{ENGINE}/block_manager.py": "tests/unit/test_block_manager.py",
    f"{ENGINE}/free_runs.py": "tests/unit/test_block_manager.py",
    f"{ENGINE}/prefix_keys.py": "tests/unit/test_prefix_keys.py",
    f"{ENGINE}/state_slots.py": "tests/unit/test_state_slots.py tests/unit/test_scheduler_states.py",
    f"{ENGINE}/contexts.py": "tests/unit/test_scheduler_states.py tests/unit/test_scheduler_prefix.py",
    f"{ENGINE}/sequence.py": "tests/unit/test_sequence.py tests/unit/test_scheduler.py",
    f"{ENGINE}/shares.py": "tests/unit/test_scheduler.py tests/unit/test_shares.py",
    f"{ENGINE}/scheduler.py": "tests/unit/test_scheduler.py tests/unit/test_scheduler_prefix.py",
    "runtime/lockstep_runtime/supervisor/state_machine.py": "tests/unit/test_supervisor_state_machine.py",
    "operator/lockstep_operator/decisions/rollout.py": "tests/unit/test_operator_rollout.py",
}
fork = get_context("fork")


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change: its line before and after, and the whole module as it became."""

    operator: str
    change: str
    text: str

    @property
    def changes_nothing(self) -> bool:
        """How a dataclass or struct is stored, and `*` in a signature, which is no multiplication, change no result.

        A constant that is one larger or smaller is another choice: tests use it by its name.
        """
        before = self.change.split(" => ")[0].lstrip()
        no_arithmetic = (before.startswith("def ") or ", *, " in before) and "BinaryOperator" in self.operator
        storage = before.startswith("@dataclass(") or (before.startswith("class ") and "frozen=" in before)
        other_choice = CONSTANT.match(self.change) is not None and "Number" in self.operator
        return storage or no_arithmetic or other_choice


def main(words: list[str]) -> int:
    os.chdir(ROOT)
    os.environ["LOCKSTEP_SIM_SCHEDULES"] = SCHEDULES
    known = {line.rsplit("  # ", 1)[0].strip() for line in EQUAL.read_text().splitlines() if line.strip()}
    failed = False
    for module in [one for one in TESTS if not words or any(word in one for word in words)]:
        for line in survivors(module):
            failed |= line not in known
            print(("equal: " if line in known else "ALIVE: ") + line, flush=True)
    return int(failed)


def survivors(module: str) -> Iterator[str]:
    """`file: operator of the mutation: the line as it is => as it became`, of each change that no test noticed."""
    limit = rehearse(module)
    mutants, begun = [*mutants_of(module)], time.monotonic()
    alive = [mutant for mutant in unnoticed(module, mutants, limit) if not mutant.changes_nothing]
    print(f"{module}: {len(mutants)} mutants, {len(alive)} alive, {time.monotonic() - begun:.0f} s", flush=True)
    for mutant in alive:
        yield f"{module}: {mutant.operator.removeprefix('core/')}: {mutant.change}"


def mutants_of(module: str) -> Iterator[Mutant]:
    text = (ROOT / module).read_text()
    nodes = [*ast_nodes(get_ast(text))]
    for name in cosmic_ray.plugins.operator_names():
        operator = cosmic_ray.plugins.get_operator(name)
        if LEFT_OUT.match(name) or operator.arguments():
            continue
        for number in range(sum(len([*operator().mutation_positions(node)]) for node in nodes)):
            if (changed := mutate_code(text, operator(), number)) is not None and changed != text:
                yield Mutant(name, _change(text, changed), changed)


def _change(text: str, changed: str) -> str:
    """The changed line, before and after."""
    lines = [line for line in difflib.ndiff(text.splitlines(), changed.splitlines()) if line[0] in "+-"]
    before, after = (" ".join(line[2:].strip() for line in lines if line[0] == sign) for sign in "-+")
    return f"{before} => {after}"


# --- running their tests


def rehearse(module: str) -> int:
    """The tests of the module as it is must pass. Imports what they did; returns the CPU seconds that mutants get."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ours, theirs = fork.Pipe(duplex=False)
    process = fork.Process(target=_test, args=(module, None, None, theirs))
    process.start()
    theirs.close()
    with contextlib.suppress(EOFError):
        for name in ours.recv():
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"the tests of {module} fail without any change: {TESTS[module]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return 2 + round(2 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))


def unnoticed(module: str, mutants: Sequence[Mutant], cpu_seconds: int) -> Iterator[Mutant]:
    """Runs as many at once as there are CPUs."""
    waiting, running = deque(mutants), dict[ForkProcess, tuple[Mutant, float]]()
    while waiting or running:
        while waiting and len(running) < len(os.sched_getaffinity(0)):
            mutant = waiting.popleft()
            process = fork.Process(target=_test, args=(module, mutant.text, cpu_seconds, None))
            process.start()
            running[process] = mutant, time.monotonic() + SECONDS
        connection.wait([process.sentinel for process in running], timeout=1.0)
        for process, (mutant, end) in [*running.items()]:
            if time.monotonic() > end:
                process.kill()
                process.join()
            if process.exitcode is not None:
                del running[process]
                if process.exitcode == 0:
                    yield mutant


def _test(module: str, text: str | None, cpu_seconds: int | None, told: connection.Connection | None) -> None:
    """In the process of a mutant: exits with 0 if nothing noticed it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if text is not None and cpu_seconds is not None:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
        name = ".".join(Path(module).with_suffix("").parts[1:])
        sys.meta_path.insert(0, Changed(name, text))
    code = int(pytest.main([*OPTIONS, *TESTS[module].split()]))
    if told is not None:
        told.send([name for name in sys.modules if name.split(".")[0] not in OURS])
    os._exit(code)


class Changed(importlib.abc.MetaPathFinder):
    """Finds one module, whose text is another than its file's."""

    def __init__(self, name: str, text: str) -> None:
        self._name, self._text = name, text

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        assert spec is not None
        assert spec.origin is not None
        spec.loader = _Loader(fullname, spec.origin, self._text)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, text: str) -> None:
        super().__init__(name, path)
        self._text = text

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = compile(self._text, self.path, "exec", dont_inherit=True)
        return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
