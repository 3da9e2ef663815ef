"""Which API keys let a client in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lockstep_runtime.api.keys import MAX_BYTES, ApiKeys


def changed(file: Path, text: str) -> None:
    """As the kubelet does it: another file takes the name."""
    fresh = file.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(file)


def test_without_any_none_is_asked_for() -> None:
    assert not ApiKeys().asked_for
    assert not ApiKeys("").asked_for
    assert ApiKeys("secret").asked_for


def test_one_that_is_given_is_always_valid() -> None:
    keys = ApiKeys("secret")
    assert keys.accepts(b"secret")
    assert not keys.accepts(b"secre")
    assert not keys.accepts(b"")


def test_every_line_of_the_file_is_valid_until_the_file_changes(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("old\n")
    keys = ApiKeys(file=file)
    assert [keys.accepts(key) for key in (b"old", b"new", b"")] == [True, False, False]
    changed(file, "old\r\n  new  \n\n")
    assert [keys.accepts(key) for key in (b"old", b"new", b"")] == [True, True, False]
    changed(file, "new")
    assert [keys.accepts(key) for key in (b"old", b"new", b"")] == [False, True, False]


def test_a_key_of_the_same_length_in_the_same_second_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("aaa")
    keys = ApiKeys(file=file)
    assert keys.accepts(b"aaa")
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    changed(file, "bbb")
    os.utime(file, ns=times)
    assert keys.accepts(b"bbb")


def test_a_file_that_is_not_there_lets_nobody_in_and_later_nobody_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys"
    keys = ApiKeys(file=file)
    assert keys.asked_for
    assert not keys.accepts(b"")
    file.write_text("key")
    assert keys.accepts(b"key")
    file.unlink()
    assert keys.accepts(b"key")
    assert keys.accepts(b"key")
    told = [record.getMessage() for record in caplog.records]
    assert ["0 stay valid" in told[0], "1 stay valid" in told[-1], len(told)] == [True, True, 2], "once each"


def test_an_empty_file_lets_nobody_in(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("\n\n")
    keys = ApiKeys(file=file)
    assert keys.asked_for
    assert not keys.accepts(b"")


def test_a_file_of_any_size_costs_a_bounded_look(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("first\n" + "x" * MAX_BYTES + "\nlast\n")
    keys = ApiKeys(file=file)
    assert keys.accepts(b"first")
    assert not keys.accepts(b"last")
