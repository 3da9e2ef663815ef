"""Environment variables for torch and NCCL. Imports no torch: the supervisor sets them for its children.

They must be set before a process has threads: `setenv` beside a thread that reads it is undefined.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

# What goes wrong in a collective is the engine's to handle. ProcessGroupNCCL would end the process: for a collective's
# error or time-out, for a CUDA error that its watchdog meets first, when it dumps its trace, or when it takes its
# watchdog for stuck. Read by torch 2.11 to 2.15 (torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp, FlightRecorder.cpp).
NCCL_VARIABLES: Final = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_FR_DUMP_ON_TIMEOUT": "0",  # its newer name, which comes first where both are known
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    # No watchdog thread at all. At an error it sleeps four times the dump's time-out, by default for a minute, and the
    # group's destructor waits for it. Nothing blocks for this: nobody waits for a collective's work.
    "TORCH_NCCL_BLOCKING_WAIT": "1",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "1",  # should there be a watchdog all the same
    "TORCH_FR_WAIT_TIMEOUT_DUMP_MILSEC": "1",
    # The flight recorder takes a stack trace of every collective, and keeps events that only the watchdog retires.
    "TORCH_FR_BUFFER_SIZE": "0",
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "0",
}


def missing_nccl_variables(environment: Mapping[str, str]) -> list[str]:
    """Those that are not as they have to be, as NAME=value."""
    return [f"{name}={value}" for name, value in NCCL_VARIABLES.items() if environment.get(name) != value]
