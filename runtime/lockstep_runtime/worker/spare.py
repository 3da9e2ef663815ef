"""The spare: it has imported all that a rank needs, and every rank's process of its pod is forked from it.

So a new process costs no import, whichever rank it is for and however many there were before it, and the ranks of a pod
share the memory of what they all import. The spare never has a thread nor touches a device: neither survives a fork.
"""

from __future__ import annotations

import functools
import gc
import os
import socket
from typing import NoReturn

import msgspec

from lockstep_runtime.config import CONFIG_VARIABLE, ServeConfig
from lockstep_runtime.host import process_init
from lockstep_runtime.worker.births import give_birth


def main() -> NoReturn:
    """Get warm and say so, then give birth to whatever rank is asked for, until nobody can ask."""
    config = msgspec.json.decode(os.environ[CONFIG_VARIABLE], type=ServeConfig)
    title = f"model={config.model_name} group={config.group}"
    process_init.become("spare", f"young spare {title}")
    orders = _take_orders_from_stdin()
    warm_up()
    process_init.become("spare", f"spare {title}")
    from lockstep_runtime.worker import main as worker  # imported by `warm_up`

    orders.send(process_init.WARM)
    give_birth(orders, functools.partial(worker.main, config))


def warm_up() -> None:
    """Import torch and all that a rank uses of it, without touching a device."""
    gc.disable()  # nothing that an import makes is garbage, and looking for it takes a twelfth of the time
    import torch

    import lockstep_runtime.worker.main  # noqa: F401 - for what importing it costs

    torch.set_num_threads(1)
    with torch.inference_mode():
        torch.nn.functional.linear(torch.ones(8, 64), torch.ones(64, 64))  # the kernels' own start-up
    gc.collect()
    gc.enable()
    gc.freeze()  # a collection in a rank writes to no page that it shares with the others


def _take_orders_from_stdin() -> socket.socket:
    orders = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return orders
