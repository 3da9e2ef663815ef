"""Meeting in shared memory: who waits for a rank that does not come can be called off."""

from __future__ import annotations

import threading
import time

import pytest

from lockstep_runtime.parallel.errors import GroupAborted, GroupError
from lockstep_runtime.parallel.shared_memory import SharedFile, SharedMemoryGroup


def test_a_meeting_that_is_called_off_is_left_at_once() -> None:
    place, cancelled = SharedFile(2), threading.Event()
    threading.Timer(0.1, cancelled.set).start()
    begun = time.monotonic()
    with pytest.raises(GroupAborted, match="called off"):
        SharedMemoryGroup(place.address, 0, 2, 60.0, cancelled.is_set)
    assert time.monotonic() - begun < 30
    place.close()


def test_a_rank_that_does_not_come_is_named() -> None:
    place = SharedFile(2)
    with pytest.raises(GroupError, match="rank 1 did not join in time"):
        SharedMemoryGroup(place.address, 0, 2, 0.05)
    place.close()
