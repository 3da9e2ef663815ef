"""Which device a rank computes on, and how it is made ready."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

import torch

from lockstep_runtime.config import ServeConfig
from lockstep_runtime.protocol.bus import LoadFailure
from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.worker.fault_classifier import is_out_of_memory

logger = logging.getLogger(__name__)

SETTLE_SECONDS: Final = 10.0  # for a driver to give back what a killed process held
QUIET_SECONDS: Final = 0.3
LOOK_SECONDS: Final = 0.05
_BUSY: Final = "busy or unavailable"  # as a GPU in exclusive mode is until the process before this one is gone


def choose_device(config: ServeConfig, backend: str, rank: int, visible: int) -> torch.device:
    """`backend` is 'nccl' or 'cpu', `visible` the number of GPUs here. Pure.

    Raises:
        ModelError: there are too few; the sentence says what to do.
    """
    if backend != "nccl" and config.device != "cuda":
        return torch.device("cpu")
    if not visible:
        raise _gone(f"rank {rank} is to compute on a GPU, and CUDA sees none here")
    here = rank % config.ranks_per_pod
    if backend == "nccl" and here >= visible:
        raise _gone(
            f"rank {rank} needs a GPU of its own: {config.ranks_per_pod} ranks run here, and CUDA sees {visible}; "
            "NCCL refuses two ranks on one"
        )
    return torch.device("cuda", here % visible)


def _gone(sentence: str) -> ModelError:
    return ModelError(sentence, kind=LoadFailure.DEVICE_LOST)


def sharers(config: ServeConfig, visible: int) -> int:
    """Ranks of this pod that compute on the same GPU, at most."""
    return -(-config.ranks_per_pod // max(1, visible))


def prepare(device: torch.device) -> None:
    """Make it this thread's, and set what holds for the whole process.

    Raises:
        RuntimeError: CUDA's own, of a device that can't be used.
    """
    if device.type != "cuda":
        return
    choose_attention_kernels()
    open_device(device, time.monotonic() + SETTLE_SECONDS)


def choose_attention_kernels() -> None:
    """Without cuDNN's, which torch prefers on Hopper and later: cuDNN builds a plan for each length of a context, for
    tens of milliseconds, and keeps it for ever. Every decode step has a length that was not there before."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def open_device(device: torch.device, deadline: float) -> None:
    """The context takes memory, too: what was just killed may still hold it.

    Raises:
        RuntimeError: CUDA's own.
    """
    while True:
        try:
            torch.cuda.set_device(device)
            torch.cuda.mem_get_info(device)
            return
        except RuntimeError as error:
            if not (is_out_of_memory(error) or _BUSY in str(error)) or time.monotonic() > deadline:
                raise
            time.sleep(LOOK_SECONDS)


def wait_for_memory(free: Callable[[], int], needed: int | None, now: Callable[[], float] = time.monotonic) -> int:
    """Until so many bytes are free, or SETTLE_SECONDS are over; how many are. Where nobody knows how many are needed:
    until no more have come for QUIET_SECONDS.

    What a killed process held comes back a moment after the process is gone: a rank that looked too early would find no
    room, or offer a smaller KV cache.
    """
    begun = grown = now()
    found = free()
    while now() < begun + SETTLE_SECONDS:
        if found >= needed if needed is not None else now() > grown + QUIET_SECONDS:
            return found
        time.sleep(LOOK_SECONDS)
        before, found = found, free()
        if found > before:
            grown = now()
    if needed is not None and found < needed:
        logger.warning(
            "%.1f GB of the device are free; the process before this one had %.1f", found / 1e9, needed / 1e9
        )
    return found
