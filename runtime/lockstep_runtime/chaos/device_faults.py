"""Errors on purpose after which CUDA's context answers nothing but that error, until the process ends.

They are real: a kernel is queued that fails on the device. As any such error, it shows in whatever waits for the device
next.
"""

from __future__ import annotations

import logging
from typing import Any, Final

import torch
from torch import Tensor

from lockstep_runtime.protocol.chaos import Injection

logger = logging.getLogger(__name__)

FAR_BYTES: Final = 1 << 45  # from any memory of the device's to where none is mapped


class _OneFarAway:
    """Two numbers as https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html has them, the second of
    which lies in no memory."""

    def __init__(self, first: Tensor) -> None:
        self.first = first  # kept alive
        self.__cuda_array_interface__: dict[str, Any] = {
            "version": 2,
            "data": (first.data_ptr(), False),
            "typestr": "<f4",
            "shape": (2,),
            "strides": (FAR_BYTES,),
        }


def provoke(kind: Injection) -> None:
    """Queue the failing kernel on this rank's GPU; on a rank without one nothing happens but a log line."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        logger.error("inject: %s is refused: this rank does not compute on a GPU", kind)
        return
    logger.warning("inject: %s on %s", kind, torch.cuda.get_device_name())
    number = torch.zeros(1, device="cuda")
    if kind is Injection.DEVICE_ASSERT:
        number.index_select(0, torch.ones(1, dtype=torch.int64, device="cuda"))
    else:
        torch.as_tensor(_OneFarAway(number)).add_(1)
