"""Which API keys let a client in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lockstep_runtime.api.keys import MAX_BYTES, ApiKeys


class Secret:
    """A mounted Secret, written as the kubelet does (its AtomicWriter): the file is a link through `..data`, which is
    exchanged for a new folder."""

    def __init__(self, folder: Path, text: str) -> None:
        self._folder, self._versions = folder, 0
        self.write(text)
        self.file = folder / "keys"
        self.file.symlink_to("..data/keys")

    def write(self, text: str) -> None:
        self._versions += 1
        version = self._folder / f"..version_{self._versions}"
        version.mkdir()
        (version / "keys").write_text(text)
        fresh = self._folder / "..data_tmp"
        fresh.symlink_to(version.name)
        fresh.replace(self._folder / "..data")


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
    secret = Secret(tmp_path, "old\n")
    keys = ApiKeys(file=secret.file)
    assert [keys.accepts(key) for key in (b"old", b"new", b"")] == [True, False, False]
    secret.write("old\r\n  new  \n\n")
    assert [keys.accepts(key) for key in (b"old", b"new", b"")] == [True, True, False]
    secret.write("new")
    assert [keys.accepts(key) for key in (b"old", b"new", b"")] == [False, True, False]


def test_a_key_of_the_same_length_in_the_same_second_is_noticed(tmp_path: Path) -> None:
    secret = Secret(tmp_path, "aaa")
    keys = ApiKeys(file=secret.file)
    assert keys.accepts(b"aaa")
    before = secret.file.stat()
    secret.write("bbb")
    os.utime(secret.file, ns=(before.st_atime_ns, before.st_mtime_ns))
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
