"""Work on weights that is done tensor by tensor, on all cores: a rank that comes back has them nearly to itself."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

import torch

from lockstep_runtime.host.cgroup import cpus

ENDING_SECONDS: Final = 2.0  # for threads to be gone; more of them have other things to do
MOST: Final = 8  # memory's bandwidth is the bound before that
_T = TypeVar("_T")
_R = TypeVar("_R")


def threads() -> int:
    """How many work at once."""
    return min(MOST, int(cpus()) or 1)


def in_threads(work: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[_R]:
    """The results in the items' order; torch lets go of the interpreter while it computes."""

    def run(item: _T) -> _R:
        with torch.inference_mode():
            return work(item)

    with _one_core_each(), ThreadPoolExecutor(threads()) as pool:
        yield from pool.map(run, items)


@contextlib.contextmanager
def _one_core_each() -> Iterator[None]:
    """On a GPU's host threads that begin meanwhile start none of OpenMP's: there are a hundred cores to see, of which a
    pod has a few. (Elsewhere a rank may be forked later, and there are as many threads as it has cores.)"""
    own = torch.get_num_threads()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if torch.get_num_threads() != own:
            torch.set_num_threads(own)


def in_own_thread(work: Callable[[], _R]) -> _R:
    """The result. Threads that OpenMP starts for the work end with its thread; in the caller's there is none of them,
    so that it may be forked.

    All have ended when this returns, the kernel's part included, for which a join of Python's does not wait: a thread
    that ends gives back memory of MKL's and OpenMP's under locks, and a child that is forked meanwhile has them locked
    for ever.
    """
    before = _threads_of_kernel()

    def run() -> _R:
        torch.set_num_threads(torch.get_num_threads())  # OpenMP has a number for each thread
        return work()

    try:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(run).result()
    finally:
        deadline = time.monotonic() + ENDING_SECONDS
        while _threads_of_kernel() - before and time.monotonic() < deadline:
            time.sleep(0.0005)


def _threads_of_kernel() -> set[str]:
    """The ids of this process's threads."""
    return {thread.name for thread in Path("/proc/self/task").iterdir()}
