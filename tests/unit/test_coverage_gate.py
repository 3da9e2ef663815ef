"""What `make coverage` refuses."""

from __future__ import annotations

from typing import Any

from dev.coverage_gate import percent, problems, pure_modules


def module(lines: int, missing_lines: list[int], branches: int, missing_branches: list[list[int]]) -> dict[str, Any]:
    summary = {
        "num_statements": lines,
        "covered_lines": lines - len(missing_lines),
        "num_branches": branches,
        "covered_branches": branches - len(missing_branches),
    }
    return {"summary": summary, "missing_lines": missing_lines, "missing_branches": missing_branches}


FILES = {"p.whole": module(8, [], 2, []), "p.part": module(6, [3], 4, [[2, -1]]), "q.one": module(4, [1, 2], 0, [])}


def test_a_pure_module_is_covered_to_the_last_branch() -> None:
    assert problems(FILES, ["p.whole"], {}) == []
    assert problems(FILES, ["p.whole", "p.part", "p.gone"], {}) == ["p.part: 3, 2→exit", "p.gone: not measured"]


def test_a_package_is_at_its_floor() -> None:
    assert percent(FILES[name] for name in ("p.whole", "p.part")) == 90.0
    assert problems(FILES, [], {"p": 90.0, "q": 50.0}) == []
    assert problems(FILES, [], {"p": 90.1, "q": 51.0}) == ["p: 90.0 %, below 90.1 %", "q: 50.0 %, below 51 %"]


def test_the_pure_modules_are_those_that_neither_wait_nor_read_clocks() -> None:
    assert {"lockstep_runtime.recovery.coordinator", "lockstep_runtime.engine.scheduler"} <= set(pure_modules())
