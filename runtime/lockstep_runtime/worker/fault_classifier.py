"""Which of the seven faults an exception is. The texts are CUDA's own, as torch hands them on."""

from __future__ import annotations

from typing import Final

import torch.distributed as dist

from lockstep_runtime.distributed.errors import CommunicatorError
from lockstep_runtime.protocol.bus import LoadFailure
from lockstep_runtime.protocol.status import Fault
from lockstep_runtime.sources.errors import ModelError, chain, lasts

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
    "CUDA driver error: unknown error",
    "Cuda failure 999",  # the same in NCCL's words
    "the GPU is lost",
    "device is lost",
    # cuBLAS says no more of a kernel that failed (https://docs.nvidia.com/cuda/cublas/#cublasstatus-t): the device may
    # have come to harm, and the process can't be trusted.
    "CUBLAS_STATUS_EXECUTION_FAILED",
    "CUBLAS_STATUS_INTERNAL_ERROR",
    "CUBLAS_STATUS_MAPPING_ERROR",
)
# A driver's words where the device is gone, whenever that is.
_DEVICE_IS_GONE: Final = (
    "no CUDA-capable device is detected",
    "CUDA-capable device(s) is/are busy or unavailable",
    "CUDA error: initialization error",
)
# And torch's, where it looks for one at first, or for one that is not there.
_NO_DEVICE: Final = (
    *_DEVICE_IS_GONE,
    "invalid device ordinal",
    "CUDA driver initialization failed",
    "CUDA unknown error - this may be due to an incorrectly set up environment",
    "No CUDA GPUs are available",
    "Found no NVIDIA driver on your system",
    "The NVIDIA driver on your system is too old",
    "Torch not compiled with CUDA enabled",
)
# NCCL's words for what no peer is to blame for (ncclGetErrorString; ncclInvalidArgument, ncclInvalidUsage).
_MISUSE: Final = ("invalid argument (run with NCCL_DEBUG=WARN", "invalid usage (run with NCCL_DEBUG=WARN")
_LAST_ERROR: Final = "Last error:\n"
_AT_FAULT: Final = (
    ModelError, AttributeError, NotImplementedError, TypeError, LookupError, ValueError, AssertionError, OSError,
)  # fmt: skip
_OUT_OF_MEMORY: Final = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def classify(error: Exception) -> tuple[Fault, str]:
    """The fault and a sentence. A broken collective means that a peer is lost: the cause is elsewhere.

    A lost context is checked first: it shows in the next operation, which may be a collective or a join. The same goes
    for memory that NCCL could not allocate.
    """
    words = str(error)
    text = f"{type(error).__name__}: {_first_line(error)}"
    if isinstance(error, ArithmeticError) and type(error).__name__ == "NonFiniteError":  # the sampler's, which is torch
        return Fault.NON_FINITE, words
    if isinstance(error, RuntimeError) and _has(words, (*CONTEXT_IS_LOST, *_DEVICE_IS_GONE)):
        return Fault.CONTEXT_FAULT, f"the device context is lost: {text}"
    if is_out_of_memory(error):
        return Fault.STEP_FAILED, f"out of memory: {text}" if words else "out of memory"
    if isinstance(error, CommunicatorError | dist.DistError) and not _has(words, _MISUSE):
        return Fault.RANK_LOST, f"the collective broke: {_first_line(error)}{_last_error(words)}"
    return Fault.STEP_FAILED, text


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or _has(str(error), _OUT_OF_MEMORY)


def load_failure(error: Exception) -> LoadFailure:
    """Whether loading again can help: it may where the network, memory or a disk refused, and can't where the model,
    its files' rights, the settings or the code are at fault. What caused the error counts, too."""
    causes = list(chain(error))
    if any(_is_device_lost(one) for one in causes):
        return LoadFailure.DEVICE_LOST
    if told := next((one.kind for one in causes if isinstance(one, ModelError) and one.kind), None):
        return told
    if any(is_out_of_memory(one) for one in causes):
        return LoadFailure.TRANSIENT
    if any(isinstance(one, OSError) and not lasts(one) for one in causes):
        return LoadFailure.TRANSIENT
    return LoadFailure.PERMANENT if any(isinstance(one, _AT_FAULT) for one in causes) else LoadFailure.TRANSIENT


def _is_device_lost(error: BaseException) -> bool:
    """torch says that it was built without CUDA by an AssertionError."""
    return isinstance(error, RuntimeError | AssertionError) and _has(str(error), (*CONTEXT_IS_LOST, *_NO_DEVICE))


def _has(text: str, words: tuple[str, ...]) -> bool:
    return any(one in text for one in words)


def _first_line(error: Exception) -> str:
    """CUDA errors carry paragraphs of advice."""
    return str(error).strip().split("\n", 1)[0]


def _last_error(words: str) -> str:
    """What NCCL adds of its own at the end: the connection and the peer, where it knows them."""
    _, found, last = words.partition(_LAST_ERROR)
    return f" ({last.strip().splitlines()[-1]})" if found and last.strip() else ""
