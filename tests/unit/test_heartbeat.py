"""A process that moves bytes says so while it loads, and one that hangs says nothing."""

from __future__ import annotations

import threading
from pathlib import Path

from lockstep_runtime.worker.heartbeat import LEAST_BYTES, Heartbeat, moved_bytes


def test_what_is_written_and_read_counts(tmp_path: Path) -> None:
    before = moved_bytes()
    (tmp_path / "download").write_bytes(b"x" * LEAST_BYTES)
    (tmp_path / "download").read_bytes()
    assert moved_bytes() - before >= 2 * LEAST_BYTES


def test_it_beats_only_when_enough_was_moved() -> None:
    counts = [100, 100, 100 + LEAST_BYTES - 1, 100 + LEAST_BYTES, 100 + LEAST_BYTES + 5, 100 + 2 * LEAST_BYTES]
    beats: list[int] = []
    counted = threading.Event()

    def count() -> int:
        if len(counts) == 1:
            counted.set()
            return counts[0]
        return counts.pop(0)

    with Heartbeat(beats.append, 0.001, count):
        assert counted.wait(10.0)
    assert beats == [LEAST_BYTES, 2 * LEAST_BYTES]
    assert not any(thread.name == "heartbeat" for thread in threading.enumerate())
