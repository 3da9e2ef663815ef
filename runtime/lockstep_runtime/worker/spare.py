"""The spare: it has imported all that a rank needs, and every rank's process of its pod is forked from it.

So a new process costs no import, whichever rank it is for and however many there were before it, and the ranks of a pod
share the memory of what they all import. The spare never has a thread nor touches a device: neither survives a fork.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
from typing import NoReturn

import msgspec

from lockstep_runtime import child
from lockstep_runtime.config import CONFIG_VARIABLE, ServeConfig


def main() -> NoReturn:
    """Get warm and say so, then give birth to whatever rank is asked for, until nobody can ask."""
    config = msgspec.json.decode(os.environ[CONFIG_VARIABLE], type=ServeConfig)
    title = f"model={config.model_name} group={config.group}"
    child.become("spare", f"young spare {title}")
    orders = _take_orders_from_stdin()
    warm_up()
    child.become("spare", f"spare {title}")
    orders.send(child.WARM)
    while True:
        data, descriptors, _, _ = socket.recv_fds(orders, 4096, 3, socket.MSG_CMSG_CLOEXEC)
        if not data:
            sys.exit(0)
        birth, (progress, cache, go) = msgspec.json.decode(data, type=child.Birth), descriptors
        pid = fork_orphan()
        if pid == 0:
            orders.close()
            _live(config, birth, progress, cache, go)
        for descriptor in descriptors:
            os.close(descriptor)
        orders.send(str(pid).encode())


def warm_up() -> None:
    """Import torch and all that a rank uses of it, without touching a device."""
    import torch

    import lockstep_runtime.worker.main  # noqa: F401 - for what importing it costs

    torch.set_num_threads(1)
    with torch.inference_mode():
        torch.nn.functional.linear(torch.ones(8, 64), torch.ones(64, 64))  # the kernels' own start-up
    gc.collect()
    gc.freeze()  # a collection in a rank writes to no page that it shares with the others


def fork_orphan() -> int:
    """Fork a process that is a child of the supervisor, not of this one: pid, or 0 in it.

    The one between them ends at once, and its child falls to the nearest process that takes orphans.
    """
    read_end, write_end = os.pipe()
    between = os.fork()
    if between == 0:
        pid = os.fork()
        if pid:
            os.write(write_end, str(pid).encode())
            os._exit(0)
        os.close(read_end)
        os.close(write_end)
        return 0
    os.close(write_end)
    pid = int(os.read(read_end, 32))
    os.close(read_end)
    os.waitpid(between, 0)
    return pid


def _take_orders_from_stdin() -> socket.socket:
    orders = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return orders


def _live(config: ServeConfig, birth: child.Birth, progress: int, cache: int, go: int) -> NoReturn:
    """In the newborn."""
    os.setpgid(0, 0)
    if not os.read(go, 1):
        os._exit(0)  # the supervisor did not wait for it
    os.close(go)
    os.environ[child.INCARNATION_VARIABLE] = birth.incarnation
    os.environ[child.PROGRESS_VARIABLE] = str(progress)
    os.environ[child.CACHE_VARIABLE] = str(cache)
    from lockstep_runtime.worker import main as worker  # imported by `warm_up`

    try:
        worker.main(config, birth.rank)
    finally:
        os._exit(1)  # never back into the spare's loop
