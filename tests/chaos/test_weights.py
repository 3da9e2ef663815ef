"""Weights that change in memory are found by the scrub and healed from the cache, which is itself checked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.chaos import Arena, healed, ranks_of, read, wait_for
from tests.support.faults import inject
from tests.support.serve import Served
from tests.support.stream import answers

from lockstep_runtime.protocol.chaos import Injection
from lockstep_runtime.protocol.status import Fault

SCRUB_SECONDS = 3.0
pytestmark = pytest.mark.third


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    """Groups that look at all their weights every few seconds."""
    opened = Arena(tmp_path_factory.mktemp("scrub"), 2, LOCKSTEP_SCRUB_SECONDS=str(SCRUB_SECONDS))
    yield opened
    opened.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_flipped_bit_is_found_within_the_interval_and_healed(arena: Arena, rank: int) -> None:
    with arena.group() as serve:
        pids = ranks_of(serve.status())
        inject(serve, Injection.FLIP_BIT, rank, phase="idle", number=987_654_321)
        wait_until_corrupt(serve, rank, 2 * SCRUB_SECONDS)
        healed(serve)
        after = ranks_of(serve.status())
        assert after[rank] != pids[rank]
        assert after[1 - rank] == pids[1 - rank]
        assert f"rank {rank} has a new process from its loaded zygote" not in serve.log.read_text()
        assert answers(read(serve)) == arena.undisturbed


def test_a_damaged_cache_is_not_used_but_made_anew(arena: Arena) -> None:
    with arena.group() as serve:
        file = cache_file(serve, 1)
        with file.open("rb") as damaged:  # kept open, so that no other file is given its number
            damage(file)  # the rank's own memory: the file's pages are its parameters
            wait_until_corrupt(serve, 1, 2 * SCRUB_SECONDS)
            healed(serve)
            assert "the weight cache is discarded" in serve.log.read_text()
            assert not os.path.samestat(os.fstat(damaged.fileno()), file.stat())
        assert answers(read(serve)) == arena.undisturbed


def wait_until_corrupt(serve: Served, rank: int, seconds: float) -> None:
    known = len([one for one in serve.status().faults if one.fault is Fault.CORRUPTION and one.recovered_at])

    def found() -> bool:
        records = [one for one in serve.status().faults if one.fault is Fault.CORRUPTION]
        return len(records) > known and records[-1].rank == rank and ".weight" in records[-1].message

    wait_for(found, f"the corruption of rank {rank} is told", 10 * seconds)  # a busy machine does not count


def cache_file(serve: Served, rank: int) -> Path:
    folder = serve.log.parent / "shm"
    return next(path for path in folder.iterdir() if path.name.endswith(f"-{rank}"))


def damage(file: Path) -> None:
    """One bit, far behind the header."""
    with file.open("r+b") as stream:
        at = os.fstat(stream.fileno()).st_size // 2
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 4]))
