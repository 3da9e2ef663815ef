"""A rank's loaded spare: its process as it was when it had just loaded, from which its next ones are forked.

They share the weights with it, packed or not, until somebody writes to them, which nobody does. So a lost process is
replaced without a weight being read, checked or packed; nor does anybody wait for the fork and for what the kernel does
when a page is first read, since the next process is forked ahead. Only on CPUs: what a device holds doesn't survive a
fork.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final, NoReturn

from lockstep_runtime.config import ServeConfig
from lockstep_runtime.host import process_init
from lockstep_runtime.worker.births import Life, fork_orphan, give_birth

logger = logging.getLogger(__name__)

_THE_RANKS_OWN: Final = ("socket:", "/memfd:lockstep-")  # its connections, its progress record and its KV cache


def leave_loaded_spare(config: ServeConfig, rank: int, orders: int, live: Life, prepare: Callable[[], None]) -> None:
    """By a rank that has just loaded; `orders` is a socket's descriptor.

    This thread must not have computed in parallel: OpenMP's threads don't survive a fork, and it would wait for them.
    """
    gc.freeze()  # so that no newborn's collector closes what was this process's
    with socket.socket(fileno=orders) as taken:
        try:
            newborn = fork_orphan() == 0
        except OSError as error:
            logger.warning("rank %d has no loaded spare, and its next process loads again: %s", rank, error)
            return
        if newborn:
            _wait(config, rank, taken, live, prepare)


def _wait(config: ServeConfig, rank: int, orders: socket.socket, live: Life, prepare: Callable[[], None]) -> NoReturn:
    """In the loaded spare. It never returns: what its stack refers to stays as it is, in the newborns too."""
    try:
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)  # the old one may be locked for ever
        _let_go(orders.fileno())
        title = f"loaded spare of rank {rank} model={config.model_name} group={config.group}"
        process_init.become(f"loaded spare {rank}", title)
        myself = os.pidfd_open(os.getpid())
        socket.send_fds(orders, [process_init.WARM], [myself])
        os.close(myself)
        give_birth(orders, live, prepare)
    finally:
        os._exit(1)


def _let_go(orders: int) -> None:
    """Of what ends with the rank's process. The numbers stay in use, so that whatever closes them harms no other."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for link in list(Path("/proc/self/fd").iterdir()):
        if int(link.name) not in (orders, nothing) and _target(link).startswith(_THE_RANKS_OWN):
            os.dup2(nothing, int(link.name), inheritable=False)


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except FileNotFoundError:  # the descriptor by which the folder was read
        return ""
