"""Which fault an exception is, with the texts that CUDA, cuBLAS, NCCL and torch really use."""

from __future__ import annotations

import pytest
import torch

from lockstep_runtime.parallel.errors import GroupAborted, GroupError
from lockstep_runtime.wire import Fault
from lockstep_runtime.worker.classify import classify
from lockstep_runtime.worker.sampler import NonFiniteError

ADVICE = "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace is wrong.\n"
# cudaGetErrorString of CUDA 13.2, of every error that needs a new process by the headers' words
ENDS_THE_CONTEXT = (
    "an illegal memory access was encountered",
    "device-side assert triggered",
    "uncorrectable ECC error encountered",
    "uncorrectable NVLink error detected during the execution",
    "Invalid access of peer GPU memory over nvlink or a hardware error",
    "the launch timed out and was terminated",
    "hardware stack error",
    "an illegal instruction was encountered",
    "misaligned address",
    "operation not supported on global/shared address space",
    "invalid program counter",
    "unspecified launch failure",
    "tensor memory not completely freed",
    "the MPS client has been terminated by the server",
    "context is destroyed",
    "unknown error",
)
LEAVES_IT_USABLE = ("invalid argument", "invalid device ordinal", "too many resources requested for launch", "no error")


@pytest.mark.parametrize("text", ENDS_THE_CONTEXT)
def test_an_error_after_which_every_call_fails_is_a_context_fault(text: str) -> None:
    fault, message = classify(torch.AcceleratorError(f"CUDA error: {text}{ADVICE}"))
    assert fault is Fault.CONTEXT_FAULT
    assert message == f"the device context is lost: AcceleratorError: CUDA error: {text}"


@pytest.mark.parametrize("text", LEAVES_IT_USABLE)
def test_other_errors_of_cuda_fail_the_step_only(text: str) -> None:
    assert classify(torch.AcceleratorError(f"CUDA error: {text}{ADVICE}"))[0] is Fault.STEP_FAILED


@pytest.mark.parametrize(
    "error",
    [
        GroupError("rank 1 could not join epoch 4 at tcp://h:1: CUDA error: device-side assert triggered"),
        RuntimeError("NCCL error in: NCCLUtils.cpp:93, unhandled cuda error\nLast error:\nCuda failure 700 'an illegal "
                     "memory access was encountered'"),
    ],
)  # fmt: skip
def test_a_lost_context_is_known_wherever_it_shows(error: RuntimeError) -> None:
    assert classify(error)[0] is Fault.CONTEXT_FAULT


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 139 GiB"
        ),
        torch.AcceleratorError(f"CUDA error: out of memory{ADVICE}"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError("no"),
    ],
)
def test_out_of_memory_fails_the_step_and_says_so(error: Exception) -> None:
    fault, message = classify(error)
    assert fault is Fault.STEP_FAILED
    assert message.startswith("out of memory: ")
    assert "\n" not in message


def test_a_broken_collective_is_hearsay_of_a_lost_peer() -> None:
    assert classify(GroupError("gloo: connection closed by peer")) == (
        Fault.RANK_LOST, "the collective broke: gloo: connection closed by peer",
    )  # fmt: skip
    assert classify(GroupAborted("the communicator was aborted"))[0] is Fault.RANK_LOST
    assert classify(NonFiniteError("2 rows")) == (Fault.NON_FINITE, "2 rows")
