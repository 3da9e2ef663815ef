"""What stands in a KV cache is kept over a repair, unless it is found to be no number."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.chaos import Arena, healed, ranks_of, read
from tests.support.stream import answers

from lockstep_runtime.protocol.status import Fault
from lockstep_runtime.recovery.log_trail import TrailPhase

pytestmark = pytest.mark.third


def test_a_nan_that_stands_in_a_cache_is_found_and_costs_no_request(arena: Callable[[int], Arena]) -> None:
    group = arena(2)
    with group.group() as serve:
        known = {record.id for record in serve.status().faults}
        streams = read(serve)
        serve.until(lambda: all(stream.pieces > 3 or stream.error for stream in streams), "the streams have begun")
        spoil(ranks_of(serve.status())[1])
        assert answers(streams) == group.undisturbed, serve.log.read_text()
        healed(serve)
        told = [(one.fault, one.rank, one.rung) for one in serve.status().faults if one.id not in known]
        assert told == [(Fault.NON_FINITE, 1, "Rebuild")]
        assert [line["kept"] for line in serve.records() if line.get("phase") == TrailPhase.RESUMED][-1] is False


def spoil(pid: int) -> None:
    """A quarter of the rank's memory of keys and values is NaN from now on: all keys of the first layers."""
    links = Path(f"/proc/{pid}/fd").iterdir()
    cache = next(link for link in links if "/memfd:lockstep-cache-" in str(link.readlink()))
    with cache.open("r+b", buffering=0) as memory:
        numbers = (cache.stat().st_size - mmap.PAGESIZE) // 4
        memory.seek(mmap.PAGESIZE)
        memory.write(struct.pack("<f", float("nan")) * (numbers // 4))
