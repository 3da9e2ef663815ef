"""A rank's loaded zygote: a copy of its process as it was when it had just loaded, from which its next ones are forked.

They share the weights with it, packed or not, until somebody writes to them, which nobody does. So a lost process is
replaced without a weight being read, checked or packed; nor does anybody wait for the fork and for what the kernel does
when a page is first read, since the next process stands by. Only on CPUs: what a device holds doesn't survive a fork.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys
from pathlib import Path
from typing import Final, NoReturn

from lockstep_runtime.host import process_init
from lockstep_runtime.zygote.messages import Entrypoint, send_ready
from lockstep_runtime.zygote.reparented_fork import reparented_fork
from lockstep_runtime.zygote.server import serve_forks

logger = logging.getLogger(__name__)

_THE_RANKS_OWN: Final = ("socket:", "/memfd:lockstep-")  # its connections, its progress record and its KV cache


def fork_loaded_zygote(rank: int, title: str, descriptor: int, entrypoint: Entrypoint) -> None:
    """By a rank that has just loaded. This thread must not have computed in parallel: OpenMP's threads don't survive a
    fork, and it would wait for them.

    Args:
        title: what the processes belong to.
        descriptor: of the socket on which the zygote is to take requests; closed here.
        entrypoint: what its children do.
    """
    gc.freeze()  # so that no child's collector closes what was this process's
    with socket.socket(fileno=descriptor) as requests:
        try:
            is_zygote = reparented_fork() == 0
        except OSError as error:
            logger.warning("rank %d has no loaded zygote, and its next process loads again: %s", rank, error)
            return
        if is_zygote:
            _serve(rank, title, requests, entrypoint)


def _serve(rank: int, title: str, requests: socket.socket, entrypoint: Entrypoint) -> NoReturn:
    """It never returns: what its stack refers to stays as it is, in its children too."""
    try:
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)  # the old one may be locked for ever
        _give_up_files(requests.fileno())
        process_init.become(f"loaded zygote {rank}", f"loaded zygote of rank {rank} {title}")
        myself = os.pidfd_open(os.getpid())
        send_ready(requests, myself)
        os.close(myself)
        serve_forks(requests, entrypoint, with_standby=True)
    finally:
        os._exit(1)


def _give_up_files(requests: int) -> None:
    """Those that end with the rank's process. Their numbers stay in use: whatever closes them harms no other."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for link in list(Path("/proc/self/fd").iterdir()):
        if int(link.name) not in (requests, nothing) and _target(link).startswith(_THE_RANKS_OWN):
            os.dup2(nothing, int(link.name), inheritable=False)


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except FileNotFoundError:  # the descriptor by which the folder was read
        return ""
