"""I1: whether memory of the device outlives the process that allocated it, while another holds its descriptor.

By CUDA's driver alone (https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__VA.html): a child allocates, writes
and sends the descriptor; it is killed; only then does this process touch CUDA, map the memory and compare.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any, Final

from tests.gpu.findings import Row, answer

NBYTES: Final = 4 << 30
BYTE: Final = 0xA7
PINNED, POSIX_FD, DEVICE, READ_WRITE = 1, 1, 1, 3  # of cuda.h's enums
GIVE: Final = "--give"


class Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class AllocationProperties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("requested_handle_types", ctypes.c_int),
        ("location", Location),
        ("win32_handle_metadata", ctypes.c_void_p),
        ("compression_type", ctypes.c_ubyte),
        ("gpu_direct_rdma_capable", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    ]


class AccessDescription(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = [("location", Location), ("flags", ctypes.c_int)]


class Driver:
    """libcuda, with the device's primary context current."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self("cuInit", 0)
        self("cuDeviceGet", ctypes.byref(device), 0)
        self("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self("cuCtxSetCurrent", context)

    def __call__(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._library, name)(*arguments):
            raise RuntimeError(f"{name} returned {code}")

    def map(self, handle: ctypes.c_ulonglong, nbytes: int) -> ctypes.c_ulonglong:
        address, size = ctypes.c_ulonglong(), ctypes.c_size_t(nbytes)
        zero = ctypes.c_size_t(0)
        self("cuMemAddressReserve", ctypes.byref(address), size, zero, ctypes.c_ulonglong(0), ctypes.c_ulonglong(0))
        self("cuMemMap", address, size, zero, handle, ctypes.c_ulonglong(0))
        access = AccessDescription(Location(DEVICE, 0), READ_WRITE)
        self("cuMemSetAccess", address, size, ctypes.byref(access), ctypes.c_size_t(1))
        return address


def give(over: socket.socket) -> None:
    driver = Driver()
    properties = AllocationProperties(type=PINNED, requested_handle_types=POSIX_FD, location=Location(DEVICE, 0))
    handle, descriptor = ctypes.c_ulonglong(), ctypes.c_int(-1)
    size, none = ctypes.c_size_t(NBYTES), ctypes.c_ulonglong(0)
    driver("cuMemCreate", ctypes.byref(handle), size, ctypes.byref(properties), none)
    driver("cuMemExportToShareableHandle", ctypes.byref(descriptor), handle, POSIX_FD, ctypes.c_ulonglong(0))
    driver("cuMemsetD8_v2", driver.map(handle, NBYTES), ctypes.c_ubyte(BYTE), ctypes.c_size_t(NBYTES))
    driver("cuCtxSynchronize")
    socket.send_fds(over, [b"here"], [descriptor.value])
    time.sleep(60)


def take(descriptor: int) -> tuple[bool, float, float]:
    """Whether the bytes are the same, and the seconds of CUDA's start and of importing and mapping."""
    begun = time.monotonic()
    driver = Driver()
    started = time.monotonic()
    handle = ctypes.c_ulonglong()
    driver("cuMemImportFromShareableHandle", ctypes.byref(handle), ctypes.c_void_p(descriptor), POSIX_FD)
    address = driver.map(handle, NBYTES)
    mapped = time.monotonic()
    same = True
    room = ctypes.create_string_buffer(1 << 20)
    for at in (0, NBYTES // 2, NBYTES - len(room)):
        driver("cuMemcpyDtoH_v2", room, ctypes.c_ulonglong(address.value + at), ctypes.c_size_t(len(room)))
        same &= room.raw == bytes([BYTE]) * len(room)
    return same, started - begun, mapped - started


def rows() -> list[Row]:
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.gpu.checks.exported", GIVE, str(theirs.fileno())], pass_fds=[theirs.fileno()]
    )
    theirs.close()
    mine.settimeout(30)
    _, descriptors, _, _ = socket.recv_fds(mine, 16, 1)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    same, start, mapping = take(descriptors[0])
    return [
        Row("I1", "exported memory outlives its process", "confirmed" if same else "refuted",
            f"{NBYTES / 2**30:.0f} GiB: CUDA's start {start:.2f} s, import and map {mapping * 1e3:.1f} ms"),
    ]  # fmt: skip


if __name__ == "__main__":
    if GIVE in sys.argv:
        give(socket.socket(fileno=int(sys.argv[-1])))
    else:
        answer(rows())
