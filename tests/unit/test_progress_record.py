"""The progress record: what a worker writes is what its supervisor reads, places by their names."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from lockstep_runtime.protocol.progress_record import SIZE, Progress, Stage, new_memory


@pytest.fixture
def ends() -> Iterator[tuple[Progress, Progress]]:
    """The writer's and the reader's, over one memory."""
    descriptor = new_memory("test")
    writer, reader = Progress(descriptor), Progress(descriptor)
    yield writer, reader
    writer.close()
    reader.close()
    os.close(descriptor)


def test_a_new_record_says_that_nothing_has_begun(ends: tuple[Progress, Progress]) -> None:
    record = ends[1].read()
    assert (record.stage, record.epoch, record.step, record.in_step) == (Stage.STARTING, 0, 0, False)
    assert (record.collective, record.inside, record.place) == (0, False, "")


def test_collectives_of_a_step_are_counted_and_named(ends: tuple[Progress, Progress]) -> None:
    writer, reader = ends
    writer.set_stage(Stage.LOADED)
    for step in (1, 2):
        writer.enter(7, step)
        for place in ("embed_tokens", "layers.0.mlp.down_proj"):
            writer.enter_collective(place)
            assert reader.read().inside
            writer.leave_collective()
    record = reader.read()
    assert (record.stage, record.epoch, record.step, record.in_step) == (Stage.LOADED, 7, 2, True)
    assert (record.collective, record.inside, record.place) == (2, False, "layers.0.mlp.down_proj")
    writer.leave(7, 2)
    assert not reader.read().in_step


def test_a_collective_that_raised_was_not_left_and_the_next_is_another(ends: tuple[Progress, Progress]) -> None:
    writer, reader = ends
    writer.enter(1, 1)
    writer.enter_collective("a")
    writer.enter_collective("b")
    record = reader.read()
    assert (record.collective, record.inside, record.place) == (2, True, "b")
    assert writer.collectives == 2


def test_whom_a_collective_waits_for(ends: tuple[Progress, Progress]) -> None:
    writer, reader = ends
    writer.enter(1, 1)
    writer.enter_collective("a")
    assert reader.read().awaited is None
    for rank in (0, 7, None, 3):
        writer.wait_for(rank)
        assert reader.read().awaited == rank
    writer.enter(1, 2)
    assert reader.read().awaited is None


def test_a_full_table_of_names_costs_only_the_names(ends: tuple[Progress, Progress]) -> None:
    writer, reader = ends
    writer.enter(1, 1)
    for number in range(SIZE // 100):
        writer.enter_collective(f"layers.{number}." + "x" * 300)
        writer.leave_collective()
    assert reader.read().place == ""
    assert reader.read().collective == SIZE // 100
    writer.enter_collective("layers.0." + "x" * 300)
    assert reader.read().place == "layers.0." + "x" * 300


def test_writing_is_cheap(ends: tuple[Progress, Progress]) -> None:
    writer, _ = ends
    writer.enter(1, 1)
    best = float("inf")
    for _ in range(20):
        begun = time.perf_counter()
        for _ in range(1000):
            writer.enter_collective("layers.0.mlp.down_proj")
            writer.leave_collective()
        best = min(best, (time.perf_counter() - begun) / 2000)
    assert best < 5e-6, f"{best * 1e6:.2f} µs a note"  # below 1 µs on a quiet machine
    print(f"{best * 1e9:.0f} ns a note")
