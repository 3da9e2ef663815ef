"""The script of tests/gpu, as far as it goes without a GPU: what becomes of checks that answer, fail and hang."""

from __future__ import annotations

import sys

import pytest
from tests.gpu import findings
from tests.gpu.findings import ANSWER, Check, Row, checks, exit_code, run_check, table

LEFT = 60.0


def check(code: str, seconds: float = 30.0) -> Check:
    return Check("fake", (sys.executable, "-c", code), seconds)


def test_what_a_check_answers_is_its_rows() -> None:
    code = f'print(\'noise\'); print({ANSWER!r} + \'[["D1", "it is slow", "confirmed", "45 ms"]]\')'
    assert run_check(check(code), LEFT) == [Row("D1", "it is slow", "confirmed", "45 ms")]


def test_one_that_fails_or_answers_nothing_is_an_error_and_shows_its_output(capsys: pytest.CaptureFixture[str]) -> None:
    [row] = run_check(check("raise RuntimeError('no such kernel')"), LEFT)
    assert (row.verdict, row.numbers) == ("error", "ended with 1; its output is above")
    assert "no such kernel" in capsys.readouterr().out
    [row] = run_check(check("print('nothing')"), LEFT)
    assert row.verdict == "error"


def test_one_that_hangs_is_ended_and_one_that_comes_too_late_left_out() -> None:
    [row] = run_check(check("import time; time.sleep(60)", seconds=0.2), LEFT)
    assert (row.verdict, row.numbers) == ("error", "did not end within 0 s")
    [row] = run_check(check("print(1)"), 0.5)
    assert (row.verdict, row.numbers) == ("left out", "the ten minutes are over")


def test_what_fails_fails_the_run_and_what_is_refuted_does_not() -> None:
    good = [Row("D1", "", verdict, "") for verdict in ("confirmed", "refuted", "holds", "measured")]
    assert exit_code(good, 0) == 0
    assert exit_code(good, 1) == 1
    for verdict in ("fails", "error", "left out"):
        assert exit_code([*good, Row("D1", "", verdict, "")], 0) == 1


def test_the_table_is_aligned() -> None:
    shown = table([Row("D13", "flash", "holds", "1 ms"), Row("D1", "a longer sentence", "fails", "")])
    assert shown.splitlines() == [
        "finding  expected           verdict  numbers",
        "D13      flash              holds    1 ms",
        "D1       a longer sentence  fails",
    ]


def test_every_check_is_there_and_all_fit_in_the_time() -> None:
    for one in checks(()):
        assert (findings.HERE / "checks" / f"{one.name}.py").exists()
    assert {path.stem for path in (findings.HERE / "checks").glob("*.py")} == {one.name for one in checks(())}
    assert [one.name for one in checks(["steps"])] == ["steps"]
    assert findings.PYTEST_SECONDS + 60 < findings.BUDGET_SECONDS


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.gpu.why_not", lambda: "CUDA sees no GPU here")
    assert findings.main([]) == 0
    assert capsys.readouterr().out == "Nothing can be shown here: CUDA sees no GPU here.\n"
