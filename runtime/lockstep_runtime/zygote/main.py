"""The pod's zygote: it has imported all that a rank needs, and every rank's first process is forked from it.

So a new process costs no import, whichever rank it is for and however many there were before it, and the ranks of a pod
share the memory of what they all import. It never has a second thread nor touches a device: neither survives a fork.
"""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable
from typing import NoReturn

from lockstep_runtime.host import process_init
from lockstep_runtime.zygote.messages import Entrypoint, send_ready
from lockstep_runtime.zygote.server import serve_forks


def run(title: str, warm_up: Callable[[], Entrypoint]) -> NoReturn:
    """Call `warm_up`, which imports, say so, and fork whatever the supervisor requests on standard input.

    Args:
        title: what the processes belong to.
        warm_up: returns what the children do.
    """
    process_init.become("zygote", f"starting zygote {title}")
    requests = _take_requests_from_stdin()
    gc.disable()  # nothing that an import makes is garbage, and looking for it takes a twelfth of the time
    entrypoint = warm_up()
    gc.collect()
    gc.enable()
    gc.freeze()  # a collection in a rank writes to no page that it shares with the others
    process_init.become("zygote", f"zygote {title}")
    send_ready(requests)
    serve_forks(requests, entrypoint)


def _take_requests_from_stdin() -> socket.socket:
    """Standard input, which children inherit, is /dev/null from then on."""
    requests = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return requests
