"""What `make mutants` changes and runs is there, whatever was renamed."""

from __future__ import annotations

from dev.mutants import EQUAL, ROOT, TESTS


def test_every_module_and_every_test_of_it_is_there() -> None:
    named = {*TESTS, *(name for tests in TESTS.values() for name in tests.split())}
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_what_is_listed_as_equal_is_of_a_module_that_is_tried() -> None:
    listed = {line.split(":")[0] for line in EQUAL.read_text().splitlines() if line.strip()}
    assert listed <= set(TESTS)
