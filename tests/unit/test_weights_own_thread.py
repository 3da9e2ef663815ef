"""A thread of its own leaves nothing behind that a fork would find in the middle of something."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lockstep_runtime.weights.parallel_map import in_own_thread


def threads() -> set[str]:
    return {thread.name for thread in Path("/proc/self/task").iterdir()}


def test_its_threads_have_ended_when_it_returns() -> None:
    """The kernel's, too, and those that computed for it."""
    numbers, before = torch.ones(512, 512), threads()
    for _ in range(50):
        assert in_own_thread(lambda: float((numbers @ numbers).sum())) == 512.0**3
        assert threads() <= before


def test_what_it_raises_is_raised_here() -> None:
    before = threads()
    with pytest.raises(ZeroDivisionError):
        in_own_thread(lambda: 1 // 0)
    assert threads() <= before
