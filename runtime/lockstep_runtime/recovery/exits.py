"""How a process ended, as text."""

from __future__ import annotations

import signal

from lockstep_runtime.protocol import bus


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def exit_text(message: bus.ProcessExited) -> str:
    """`was killed by SIGKILL`, `ended with exit code 1`, or `was killed by the kernel: out of memory (…)`."""
    if message.oom:
        return f"was {message.oom}"
    if message.signal is None:
        return f"ended with exit code {message.exit_code}"
    return f"was killed by {signal_name(message.signal)}"
