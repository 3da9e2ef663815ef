"""Who opens or reads a file, as the kernel tells it: inotify(7). A file that is mapped has been opened before."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

IN_ACCESS: Final = 0x1
IN_OPEN: Final = 0x20
_EVENT: Final = struct.Struct("iIII")  # watch, mask, cookie, length of the name behind it
_NAMES: Final = {IN_ACCESS: "read", IN_OPEN: "open"}


@contextlib.contextmanager
def accesses(*paths: Path) -> Iterator[Callable[[], list[str]]]:
    """The call returns what any process has done to these files and folders since, such as `open config.json`."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    watched = {}
    for path in paths:
        number = libc.inotify_add_watch(descriptor, os.fsencode(path.resolve()), IN_ACCESS | IN_OPEN)
        if number < 0:
            raise OSError(ctypes.get_errno(), f"{path} can't be watched")
        watched[number] = path.name
    try:
        yield lambda: _read(descriptor, watched)
    finally:
        os.close(descriptor)


def _read(descriptor: int, watched: dict[int, str]) -> list[str]:
    found = []
    with contextlib.suppress(BlockingIOError):
        while raw := os.read(descriptor, 1 << 16):
            at = 0
            while at < len(raw):
                number, mask, _, length = _EVENT.unpack_from(raw, at)
                name = raw[at + _EVENT.size : at + _EVENT.size + length].rstrip(b"\0").decode()
                at += _EVENT.size + length
                found += [f"{what} {name or watched[number]}" for bit, what in _NAMES.items() if mask & bit]
    return found
