"""The progress record of one worker: a page of memory that its supervisor can read without asking it.

The supervisor makes the memory (memfd), the worker inherits it and alone writes to it, one field at a time.
"""

from __future__ import annotations

import enum
import mmap
import os
import struct
from dataclasses import dataclass
from typing import Final

SIZE: Final = mmap.PAGESIZE
_STAGE: Final = struct.Struct("<q")
_STEP: Final = struct.Struct("<qqq")  # epoch, step, 1 while in it
_STEP_OFFSET: Final = 8


class Stage(enum.IntEnum):
    """How far the process has come in its life."""

    STARTING = 0
    LOADING = 1
    LOADED = 2


@dataclass(frozen=True, slots=True)
class Record:
    stage: Stage
    epoch: int
    step: int
    in_step: bool


class Progress:
    """The record, as its writer and its reader see it."""

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, SIZE)

    def set_stage(self, stage: Stage) -> None:
        _STAGE.pack_into(self._memory, 0, stage)

    def enter(self, epoch: int, step: int) -> None:
        _STEP.pack_into(self._memory, _STEP_OFFSET, epoch, step, 1)

    def leave(self, epoch: int, step: int) -> None:
        _STEP.pack_into(self._memory, _STEP_OFFSET, epoch, step, 0)

    def read(self) -> Record:
        (stage,) = _STAGE.unpack_from(self._memory, 0)
        epoch, step, in_step = _STEP.unpack_from(self._memory, _STEP_OFFSET)
        return Record(Stage(stage), epoch, step, bool(in_step))

    def close(self) -> None:
        self._memory.close()


def new_memory(name: str) -> int:
    """A descriptor of zeroed memory for one record; inheritable, for the worker to write to."""
    descriptor = os.memfd_create(name, 0)
    os.ftruncate(descriptor, SIZE)
    return descriptor
