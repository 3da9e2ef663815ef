"""How zygote, fetcher and engine are started: posix_spawn(3), from nothing, in a process group of their own."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from typing import Final

from lockstep_runtime.host import process_init
from lockstep_runtime.host.torch_environment import NCCL_VARIABLES

_ONE_THREAD: Final = {"OPENBLAS_NUM_THREADS": "1"}  # numpy's, which is asked for no product: a zygote must have none


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What every child of this process is given."""
    return _ONE_THREAD | dict(environment) | NCCL_VARIABLES | {process_init.PARENT_VARIABLE: str(os.getpid())}


def spawn_zygote(environment: Mapping[str, str], requests: int) -> int:
    """Its pid. `requests`: the descriptor of the socket on which it takes requests.

    Raises:
        OSError: the kernel refuses.
    """
    return _spawn("lockstep_runtime.worker", environment, {0: requests})


def spawn_engine(environment: Mapping[str, str], history: bytes, message: int) -> int:
    """Its pid.

    Args:
        history: what the engine before reported last; it may be long, so it is read from standard input.
        message: the descriptor of memory for the engine's termination message.

    Raises:
        OSError: the kernel refuses.
    """
    given = {process_init.TERMINATION_MESSAGE: message}
    if not history:
        return _spawn("lockstep_runtime.engine", environment, given)
    with os.fdopen(os.memfd_create("lockstep-history"), "r+b", buffering=0) as file:
        file.write(history)
        file.seek(0)
        variables = {**environment, process_init.HISTORY_VARIABLE: "stdin"}
        return _spawn("lockstep_runtime.engine", variables, given | {0: file.fileno()})


def spawn_fetcher(environment: Mapping[str, str], order: bytes) -> int:
    """Its pid. `order`: a `FetchOrder`, with a token that no environment is to have; read from standard input.

    Raises:
        OSError: the kernel refuses.
    """
    with os.fdopen(os.memfd_create("lockstep-fetch-order"), "r+b", buffering=0) as file:
        file.write(order)
        file.seek(0)
        return _spawn("lockstep_runtime.sources", environment, {0: file.fileno()})


def _spawn(module: str, environment: Mapping[str, str], given: Mapping[int, int]) -> int:
    """`given`: our descriptors by what they are in the child."""
    return os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", module],
        environment,
        file_actions=[(os.POSIX_SPAWN_DUP2, ours, theirs) for theirs, ours in given.items()],
        setpgroup=0,
        setsigdef=[signal.SIGTERM, signal.SIGINT, signal.SIGCHLD],
        setsigmask=[],
    )
