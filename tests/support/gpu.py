"""What tests on a GPU share: whether there is one, its memory, and jobs that may lose its context."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Final

import torch
from torch import Tensor

from lockstep_runtime.host.torch_environment import NCCL_VARIABLES

MIB: Final = 2**20
CHILD_SECONDS: Final = 120.0
SETTLE_SECONDS: Final = 20.0


def why_not() -> str:
    """Why nothing of tests/gpu can run here; empty when it can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "CUDA sees no GPU here"
    return ""


def used_bytes() -> int:
    """Of the first GPU, by all processes."""
    free, total = torch.cuda.mem_get_info(0)
    return total - free


def until_used(at_most: int, seconds: float = SETTLE_SECONDS) -> None:
    """Wait until the first GPU's memory is used by no more than this: the driver may take a moment."""
    deadline = time.monotonic() + seconds
    while (used := used_bytes()) > at_most:
        assert time.monotonic() < deadline, f"{used / MIB:.0f} MiB are in use, not {at_most / MIB:.0f} at most"
        time.sleep(0.05)


class Ballast:
    """Takes the first GPU's memory but for `left` bytes, until the block is left."""

    def __init__(self, left: int) -> None:
        self._left = left
        self._held: Tensor | None = None

    def __enter__(self) -> Ballast:
        free, _ = torch.cuda.mem_get_info(0)
        self._held = torch.empty(max(0, free - self._left), dtype=torch.uint8, device="cuda:0")
        return self

    def __exit__(self, *_: object) -> None:
        self._held = None
        torch.cuda.empty_cache()


def in_child(job: Callable[..., Any], *arguments: Any, seconds: float = CHILD_SECONDS) -> Any:
    """What the job returns in a fresh process of its own, whose context may be lost with it."""
    return in_children(job, [arguments], seconds)[0]


def in_children(job: Callable[..., Any], each: list[tuple[Any, ...]], seconds: float = CHILD_SECONDS) -> list[Any]:
    """The same in several at once, one for each tuple of arguments.

    Raises:
        AssertionError: a job raised (with its traceback), or its process ended or did not answer in time.
    """
    context = multiprocessing.get_context("spawn")  # a context does not survive a fork
    running = []
    try:
        for arguments in each:
            mine, theirs = context.Pipe()
            process = context.Process(target=_child, args=(theirs, job, arguments))
            process.start()
            theirs.close()
            running.append((mine, process))
        deadline = time.monotonic() + seconds
        return [_answer(mine, deadline) for mine, _ in running]
    finally:
        for _, process in running:
            process.join(1.0)
            process.kill()
            process.join()


def _answer(pipe: Connection, deadline: float) -> Any:
    assert pipe.poll(max(0.0, deadline - time.monotonic())), "the job did not end in time"
    try:
        answer, trouble = pipe.recv()
    except EOFError:
        raise AssertionError("the job's process ended without a word") from None
    assert not trouble, trouble
    return answer


def _child(pipe: Connection, job: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(NCCL_VARIABLES)  # as a supervisor does for its children
    try:
        pipe.send((job(*arguments), ""))
    except BaseException:  # pytest's failures are none of Exception's
        pipe.send((None, traceback.format_exc()))
