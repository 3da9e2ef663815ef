"""Which of the seven faults an exception is. The texts are CUDA's own, as torch hands them on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from lockstep_runtime.parallel.errors import GroupError
from lockstep_runtime.weights.errors import ModelError
from lockstep_runtime.wire import Fault, LoadFailure

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
# A driver's words where there is no device, or not the one that is asked for.
_NO_DEVICE: Final = (
    "no CUDA-capable device is detected",
    "CUDA-capable device(s) is/are busy or unavailable",
    "invalid device ordinal",
    "CUDA driver initialization failed",
    "initialization error",
)
_NOT_THERE: Final = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_AT_FAULT: Final = (ModelError, AttributeError, NotImplementedError, TypeError, LookupError, ValueError, AssertionError)
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


def load_failure(error: Exception) -> LoadFailure:
    """Whether loading again can help: it may where the network, memory or a disk refused, and can't where the model,
    the settings or the code are at fault. What caused the error counts, too."""
    causes = list(_chain(error))
    if any(isinstance(one, RuntimeError) and _has(str(one), (*CONTEXT_IS_LOST, *_NO_DEVICE)) for one in causes):
        return LoadFailure.DEVICE_LOST
    if told := next((one.kind for one in causes if isinstance(one, ModelError) and one.kind), None):
        return told
    if any(isinstance(one, MemoryError) or _has(str(one), _OUT_OF_MEMORY) for one in causes):
        return LoadFailure.TRANSIENT
    if any(isinstance(one, OSError) and not isinstance(one, _NOT_THERE) for one in causes):
        return LoadFailure.TRANSIENT
    return LoadFailure.PERMANENT if any(isinstance(one, _AT_FAULT) for one in causes) else LoadFailure.TRANSIENT


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    while error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__ or error


def _has(text: str, words: tuple[str, ...]) -> bool:
    return any(one in text for one in words)


def _first_line(error: Exception) -> str:
    """CUDA errors carry paragraphs of advice."""
    return str(error).strip().split("\n", 1)[0]
