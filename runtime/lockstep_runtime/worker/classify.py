"""Which of the seven faults an exception is. The texts are CUDA's own, as torch hands them on."""

from __future__ import annotations

from typing import Final

from lockstep_runtime.parallel.errors import GroupError
from lockstep_runtime.wire import Fault

# After these the device context answers every call with the same error, until its process ends
# (https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html, "the process must be terminated").
CONTEXT_IS_LOST: Final = (
    "an illegal memory access was encountered",
    "device-side assert triggered",
    "uncorrectable ECC error",
    "unspecified launch failure",
    "misaligned address",
    "an illegal instruction was encountered",
    "hardware stack error",
    "invalid program counter",
    "operation not supported on global/shared address space",
    "uncorrectable NVLink error",
    "Invalid access of peer GPU memory over nvlink or a hardware error",
    "tensor memory not completely freed",
    "the launch timed out and was terminated",
    "the MPS client has been terminated",
    "context is destroyed",
    "CUDA error: unknown error",  # what is left of a GPU that fell off the bus
    "the GPU is lost",
    "device is lost",
)
_OUT_OF_MEMORY: Final = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def classify(error: Exception) -> tuple[Fault, str]:
    """The fault's name and a sentence. A broken collective says that a peer is lost: the cause is elsewhere.

    A lost context comes first: it shows in whatever is tried next, which may be a collective or a join.
    """
    text = f"{type(error).__name__}: {_first_line(error)}"
    if isinstance(error, ArithmeticError) and type(error).__name__ == "NonFiniteError":  # the sampler's, which is torch
        return Fault.NON_FINITE, str(error)
    if isinstance(error, RuntimeError) and any(words in str(error) for words in CONTEXT_IS_LOST):
        return Fault.CONTEXT_FAULT, f"the device context is lost: {text}"
    if isinstance(error, GroupError):
        return Fault.RANK_LOST, f"the collective broke: {error}"
    if isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY):
        return Fault.STEP_FAILED, f"out of memory: {text}" if str(error) else "out of memory"
    return Fault.STEP_FAILED, text


def _first_line(error: Exception) -> str:
    """CUDA errors carry paragraphs of advice."""
    return str(error).strip().split("\n", 1)[0]
