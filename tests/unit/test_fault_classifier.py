"""Which fault an exception is, with the texts that CUDA, cuBLAS, NCCL and torch really use."""

from __future__ import annotations

import importlib.util
import mmap
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lockstep_runtime.distributed.errors import CommunicatorAborted, CommunicatorError
from lockstep_runtime.protocol.bus import LoadFailure
from lockstep_runtime.protocol.status import Fault
from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.worker.fault_classifier import classify, load_failure
from lockstep_runtime.worker.likeliest import NonFiniteError

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
        CommunicatorError("rank 1 could not join epoch 4 at tcp://h:1: CUDA error: device-side assert triggered"),
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
    assert classify(CommunicatorError("gloo: connection closed by peer")) == (
        Fault.RANK_LOST, "the collective broke: gloo: connection closed by peer",
    )  # fmt: skip
    assert classify(CommunicatorAborted("the communicator was aborted"))[0] is Fault.RANK_LOST
    assert classify(NonFiniteError("2 rows")) == (Fault.NON_FINITE, "2 rows")


NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:4166, "
VERSION = ", NCCL version 2.30.7\n"
# What NCCL 2.30 and torch 2.15 write, by its source: src/init.cc (ncclGetErrorString), src/misc/socket.cc,
# src/os/linux.cc, src/include/checks.h of NCCL; NCCLUtils.cpp (getNcclErrorDetailStr), ProcessGroupNCCL.cpp,
# socket.cpp and TCPStore.cpp below torch/csrc/distributed/c10d.
OF_COLLECTIVES = [
    (
        "a peer's socket is closed: init.cc, socket.cc",
        dist.DistBackendError(
            f"{NCCL}remote process exited or there was a network error{VERSION}ncclRemoteError: A call failed possibly "
            "due to a network error or a remote process exiting prematurely.\nLast error:\n"
            "socketProgress: Connection closed by remote peer 10.0.0.3<50482>"
        ),
        Fault.RANK_LOST,
        "socketProgress: Connection closed by remote peer 10.0.0.3<50482>",
    ),
    (
        "a system call failed: init.cc",
        dist.DistBackendError(
            f"{NCCL}unhandled system error (run with NCCL_DEBUG=INFO for details){VERSION}ncclSystemError: System call "
            "(e.g. socket, malloc) or external library call failed or device error. \nLast error:\n"
        ),
        Fault.RANK_LOST,
        "unhandled system error",
    ),
    (
        "an internal check failed: init.cc",
        dist.DistBackendError(
            f"{NCCL}internal error - please report this issue to the NCCL developers{VERSION}ncclInternalError: "
            "Internal check failed.\nLast error:\n"
        ),
        Fault.RANK_LOST,
        "internal error",
    ),
    (
        "the communicator was aborted by torch: NCCLUtils.cpp",
        dist.DistBackendError("NCCL communicator was aborted on rank 1. "),
        Fault.RANK_LOST,
        "was aborted on rank 1",
    ),
    (
        "rank 0 did not come: ProcessGroupNCCL.cpp",
        dist.DistBackendError(
            "[1] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d key-value store by key "
            "'0', but store->get('0') got error: rank 0 left. This may indicate a possible application crash on rank 0 "
            "or a network set up issue."
        ),
        Fault.RANK_LOST,
        "rank 0 left",
    ),
    (
        "a store's connection: socket.cpp",
        dist.DistNetworkError("The client socket has failed to connect to [host]:29500 (errno: 111)."),
        Fault.RANK_LOST,
        "failed to connect",
    ),
    (
        "a store's time is over: TCPStore.cpp",
        dist.DistStoreError("wait timeout after 300000ms, keys: /epoch-1/0"),
        Fault.RANK_LOST,
        "wait timeout",
    ),
    (
        "joining, which names its epoch: distributed/join.py",
        CommunicatorError(
            f"rank 1 could not join epoch 4 at tcp://h:1: {NCCL}remote process exited or there was a network"
        ),
        Fault.RANK_LOST,
        "could not join epoch 4",
    ),
    (
        "a lost context that NCCL meets: checks.h, driver_types.h",
        dist.DistBackendError(
            f"{NCCL}unhandled cuda error (run with NCCL_DEBUG=INFO for details){VERSION}ncclUnhandledCudaError: Call "
            "to CUDA function failed.\nLast error:\nCuda failure 700 'an illegal memory access was encountered'"
        ),
        Fault.CONTEXT_FAULT,
        "the device context is lost",
    ),
    (
        "a GPU that fell off the bus: checks.h",
        CommunicatorError(f"{NCCL}unhandled cuda error{VERSION}Last error:\nCuda failure 999 'unknown error'"),
        Fault.CONTEXT_FAULT,
        "the device context is lost",
    ),
    (
        "no memory for a communicator: checks.h",
        CommunicatorError(f"{NCCL}unhandled cuda error{VERSION}Last error:\nCuda failure 2 'out of memory'"),
        Fault.STEP_FAILED,
        "out of memory",
    ),
    (
        "a call that no peer is to blame for: init.cc",
        dist.DistBackendError(
            f"{NCCL}invalid usage (run with NCCL_DEBUG=WARN for details){VERSION}ncclInvalidUsage: This usually "
            "reflects invalid usage of NCCL library.\nLast error:\nDuplicate GPU detected"
        ),
        Fault.STEP_FAILED,
        "invalid usage",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("error", "fault", "told"), [pytest.param(*row[1:], id=row[0]) for row in OF_COLLECTIVES])
def test_what_nccl_and_torchs_stores_write(error: Exception, fault: Fault, told: str) -> None:
    """A network's fault is a peer's to answer for, never a request's."""
    found, message = classify(error)
    assert found is fault
    assert told in message
    assert "\n" not in message


def test_the_texts_are_the_installed_librarys() -> None:
    """What NCCL is expected to say, it says: a text that was changed would go unnoticed."""
    found = importlib.util.find_spec("nvidia.nccl")
    folders = found.submodule_search_locations if found is not None else None
    libraries = [Path(folder) / "lib" / "libnccl.so.2" for folder in folders or ()]
    if not any(library.exists() for library in libraries):
        pytest.skip("this torch came without NCCL")
    said = (
        "remote process exited or there was a network error", "unhandled system error (run with NCCL_DEBUG=INFO",
        "invalid usage (run with NCCL_DEBUG=WARN", "invalid argument (run with NCCL_DEBUG=WARN", "Cuda failure %d '%s'",
    )  # fmt: skip
    with libraries[0].open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as text:
        assert [one for one in said if text.find(one.encode()) < 0] == []


@pytest.mark.parametrize("status", ["EXECUTION_FAILED", "INTERNAL_ERROR", "MAPPING_ERROR"])
def test_a_process_whose_kernel_failed_in_cublas_is_not_trusted(status: str) -> None:
    error = RuntimeError(f"CUDA error: CUBLAS_STATUS_{status} when calling `cublasGemmEx( handle, opa, opb, m, n, k)`")
    assert classify(error)[0] is Fault.CONTEXT_FAULT


# c10/cuda/CUDAFunctions.cpp and torch/csrc/cuda/Module.cpp of torch, cudaGetErrorString of CUDA 13.2
WITHOUT_DEVICE = [
    torch.AcceleratorError(f"CUDA error: no CUDA-capable device is detected{ADVICE}"),
    torch.AcceleratorError(f"CUDA error: CUDA-capable device(s) is/are busy or unavailable{ADVICE}"),
    torch.AcceleratorError(f"CUDA error: initialization error{ADVICE}"),
    torch.AcceleratorError(f"CUDA error: invalid device ordinal{ADVICE}"),
    torch.AcceleratorError(f"CUDA error: uncorrectable ECC error encountered{ADVICE}"),
    RuntimeError("No CUDA GPUs are available"),
    RuntimeError("CUDA driver initialization failed, you might not have a CUDA gpu."),
    RuntimeError("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU"),
    RuntimeError("The NVIDIA driver on your system is too old (found version 12040)."),
    RuntimeError("CUDA unknown error - this may be due to an incorrectly set up environment, e.g. changing env"),
    AssertionError("Torch not compiled with CUDA enabled"),
]


@pytest.mark.parametrize("error", WITHOUT_DEVICE, ids=lambda error: str(error)[:40])
def test_a_gpu_that_is_gone_is_no_matter_of_trying_again(error: Exception) -> None:
    assert load_failure(error) is LoadFailure.DEVICE_LOST
    assert load_failure(ModelError("wrapped")) is LoadFailure.PERMANENT


@pytest.mark.parametrize("error", WITHOUT_DEVICE[:3], ids=str)
def test_one_that_goes_while_it_is_used_takes_the_process_with_it(error: Exception) -> None:
    """The next process is told what it is."""
    assert classify(error)[0] is Fault.CONTEXT_FAULT


def test_a_gpu_whose_memory_is_taken_is_tried_again() -> None:
    assert load_failure(torch.AcceleratorError(f"CUDA error: out of memory{ADVICE}")) is LoadFailure.TRANSIENT
