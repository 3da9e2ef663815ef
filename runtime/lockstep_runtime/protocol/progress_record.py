"""The progress record of one worker: memory that its supervisor can read without asking it.

The supervisor creates the memory (memfd); the worker inherits it and is the only writer: 64-bit words, one store each,
and a growing table of the names of collectives (modules that call them). It has no timestamps: reading a clock costs
more than the rest of an update, and a reader that samples it often sees when it changes.
"""

from __future__ import annotations

import enum
import mmap
import os
from dataclasses import dataclass
from typing import Final

SIZE: Final = 16 * mmap.PAGESIZE
_STAGE, _EPOCH, _STEP, _IN_STEP, _POSITION, _PLACE, _AWAITED, _NAMES_LENGTH = range(8)  # words
_NAMES_OFFSET: Final = 512


class Stage(enum.IntEnum):
    """How far the process has come in its life."""

    STARTING = 0
    LOADING = 1
    LOADED = 2


@dataclass(frozen=True, slots=True)
class Record:
    """`collective` counts those of the step from 1 (0: before the first); `inside`: entered and not left.

    `awaited`: the rank without which it can't be left, where that is known.
    """

    stage: Stage
    epoch: int
    step: int
    in_step: bool
    collective: int
    inside: bool
    place: str
    awaited: int | None = None


class Progress:
    """The record, as its writer and its reader see it."""

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, SIZE)
        self._view = memoryview(self._memory)
        self._words = self._view[:_NAMES_OFFSET].cast("q")
        self._places: dict[str, int] = {}  # name -> its number, from 1

    def set_stage(self, stage: Stage) -> None:
        self._words[_STAGE] = stage

    def enter(self, epoch: int, step: int) -> None:
        words = self._words
        words[_POSITION] = words[_PLACE] = words[_AWAITED] = 0
        words[_EPOCH], words[_STEP], words[_IN_STEP] = epoch, step, 1

    def leave(self, epoch: int, step: int) -> None:
        self._words[_IN_STEP] = 0

    def enter_collective(self, place: str) -> None:
        words = self._words
        words[_PLACE] = self._places.get(place) or self._number(place)
        words[_POSITION] = words[_POSITION] + 1 | 1  # odd: inside; a raise leaves without saying so

    def leave_collective(self) -> None:
        self._words[_POSITION] += 1

    def wait_for(self, rank: int | None) -> None:
        """The collective waits for this rank's part; None: no more."""
        self._words[_AWAITED] = 0 if rank is None else rank + 1

    @property
    def collectives(self) -> int:
        """Entered in this step."""
        return (self._words[_POSITION] + 1) // 2

    def read(self) -> Record:
        words = self._words
        position = words[_POSITION]
        return Record(
            stage=Stage(words[_STAGE]),
            epoch=words[_EPOCH],
            step=words[_STEP],
            in_step=bool(words[_IN_STEP]),
            collective=(position + 1) // 2,
            inside=bool(position & 1),
            place=self._name(words[_PLACE]),
            awaited=words[_AWAITED] - 1 if words[_AWAITED] else None,
        )

    def close(self) -> None:
        self._words.release()
        self._view.release()
        self._memory.close()

    def _number(self, place: str) -> int:
        """Add a name to the table; 0, no name, when it is full or there is nothing to add."""
        line = place.encode() + b"\n"
        start = _NAMES_OFFSET + self._words[_NAMES_LENGTH]
        if not place or b"\n" in line[:-1] or start + len(line) > SIZE:
            return 0
        self._view[start : start + len(line)] = line
        self._words[_NAMES_LENGTH] += len(line)
        self._places[place] = len(self._places) + 1
        return self._places[place]

    def _name(self, number: int) -> str:
        length = self._words[_NAMES_LENGTH]
        names = bytes(self._view[_NAMES_OFFSET : _NAMES_OFFSET + length]).decode().split("\n")
        return names[number - 1] if 0 < number < len(names) else ""


def new_memory(name: str) -> int:
    """A descriptor of zeroed memory for one record, to be handed to the worker that writes it."""
    descriptor = os.memfd_create(name)
    os.ftruncate(descriptor, SIZE)
    return descriptor
