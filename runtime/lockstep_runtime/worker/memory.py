"""How much memory a rank uses, and how large a KV cache it can offer."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

import torch

from lockstep_runtime.host.memory import available_bytes, total_bytes
from lockstep_runtime.layers.cache import Footprint

CPU_SHARE: Final = 0.5  # of what is free: the page cache, the engine and other programs live there too
CUDA_SHARE: Final = 0.9  # of the whole device, weights and workspace included
M_TRIM_THRESHOLD: Final = -1  # of malloc.h
M_MMAP_THRESHOLD: Final = -3
LARGE_BYTES: Final = 128 * 1024
KEPT_BYTES: Final = 512 * 1024 * 1024


def give_back_freed_memory() -> None:
    """Have the C library return every large buffer to the kernel as soon as it is freed: for loading.

    By itself it raises its threshold with the first such buffer, and later ones leave holes between the weights.
    """
    _malloc_option(M_MMAP_THRESHOLD, LARGE_BYTES)


def keep_freed_memory() -> None:
    """Have the C library keep what a step frees for the next step.

    It would otherwise map and unmap every large tensor, and the kernel zero its pages each time.
    """
    _malloc_option(M_MMAP_THRESHOLD, KEPT_BYTES)
    _malloc_option(M_TRIM_THRESHOLD, KEPT_BYTES)


def _malloc_option(option: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it, others need not
    if mallopt is not None:
        mallopt(option, value)


def used_bytes(device: torch.device) -> int:
    """Resident memory of this process (CPU), or the device memory that torch holds."""
    if device.type == "cuda":
        return int(torch.cuda.memory_reserved(device))
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return resident_pages * os.sysconf("SC_PAGE_SIZE")


def cache_budget(device: torch.device, sharers: int, step: int) -> int:
    """Bytes for the KV cache of one rank: a share of what is free, and never what its largest step needs.

    `sharers`: ranks that take their memory from the same place. `step`: bytes of that step.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return cuda_budget(free, total, used_bytes(device), sharers, step)
    return cpu_budget(available_bytes(), total_bytes(), used_bytes(device), sharers, step)


def cpu_budget(available: int, total: int, used: int, sharers: int, step: int) -> int:
    """What this process, which uses `used` bytes already, may take of the machine's or the container's memory.

    The other ranks of the pod may not have taken their part yet, so neither what is left nor a part of the whole says
    enough by itself.
    """
    room = min(available / sharers, total / sharers - used)
    return max(0, int(min(room * CPU_SHARE, room - step)))


def cuda_budget(free: int, total: int, used: int, sharers: int, step: int) -> int:
    """What this process, which uses `used` bytes already, may take of a device.

    Others may not have taken their part yet, so what is free says too little where it is shared.
    """
    reserved = max(reserved_bytes(total), step)
    return max(0, int(min(free - reserved, CUDA_SHARE * total / sharers - used, total / sharers - used - step)))


def reserved_bytes(total: int) -> int:
    """Of a device with so many bytes, what is left to steps, libraries and the driver."""
    return round((1 - CUDA_SHARE) * total)


def needed_bytes(before: Footprint | None, total: int, sharers: int) -> int | None:
    """What has to be free of a device for a rank to have what its process before this one had; None: nobody knows."""
    if before is None:
        return None
    return before.device_bytes + (reserved_bytes(total) if sharers == 1 else 0)


def blocks_as_before(blocks: int, block_bytes: int, before: Footprint | None, total: int) -> int:
    """As many as the process before this one had, if that is a matter of what a driver happens to keep: the rank with
    the smallest cache decides for all, and theirs would have to be laid out anew."""
    if before is None or before.block_bytes != block_bytes:
        return blocks
    short = (before.size.blocks - blocks) * block_bytes
    return before.size.blocks if 0 < short <= reserved_bytes(total) // 4 else blocks
