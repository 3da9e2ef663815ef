"""A step's fingerprint: equal on every rank, unless one computed something else."""

from __future__ import annotations

import ctypes
from typing import Final

import torch
from torch import Tensor

from lockstep_runtime.layers.batch import Batch

_BITS: Final = {2: torch.int16, 4: torch.int32}  # by a type's bytes


def fingerprint_of(batch: Batch, states: Tensor, hidden: Tensor) -> int:
    """Of the raw bytes of what went in and what came out: states [tokens, n], hidden of each sequence's last.

    Python's hash of a whole number is that number modulo the prime 2**61 - 1 (`sys.hash_info`): the same in every
    process, changed by any single bit, and little code: a step leaves nothing of it in the CPU's caches.

    All-reduces hide a wrong input: every rank then has the same wrong sum. They hide a wrong state of an earlier token
    as well: others see it only by its keys and values, which one rank has alone. A long prompt's states are summed as
    whole numbers where they are, since to hash them all would take longer than a step may be watched.
    """
    raw = b"".join(map(_bytes, (batch.given, batch.ends, *on_host(states, hidden))))
    return hash(int.from_bytes(raw, "little"))


def on_host(states: Tensor, hidden: Tensor) -> list[Tensor]:
    """What is hashed of a step's results. From a device by one copy, which is what waits for the step."""
    computed = [hidden]
    if len(states) > len(hidden):
        computed.append(states.view(_BITS[states.element_size()]).sum(0))  # doesn't depend on the order
    if hidden.is_cpu:
        return computed
    return [torch.cat([one.view(-1).view(torch.uint8) for one in computed]).cpu()]


def _bytes(tensor: Tensor) -> bytes:
    """Of a contiguous tensor on the host, by the shortest way there is: a decode step of a small model waits for it."""
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)
