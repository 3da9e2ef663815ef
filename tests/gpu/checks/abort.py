"""D5: how long leaving a communicator takes, and freeing it, with work queued on the device."""

from __future__ import annotations

import os
import threading
import time

import torch
from tests.gpu.findings import Row, answer
from torch._C._distributed_c10d import HashStore

from lockstep_runtime.distributed.nccl import NcclCommunicator
from lockstep_runtime.host.torch_environment import NCCL_VARIABLES

DEVICE = torch.device("cuda", 0)
QUEUED_SECONDS = 0.5
CYCLES = 50_000_000


def queue_work(seconds: float) -> None:
    """A kernel that keeps the device busy for about so long."""
    torch.cuda.synchronize()
    begun = time.monotonic()
    torch.cuda._sleep(CYCLES)  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    torch.cuda._sleep(int(CYCLES * seconds / (time.monotonic() - begun)))  # type: ignore[no-untyped-call]


def rows() -> list[Row]:
    group = NcclCommunicator(HashStore(), 0, 1, DEVICE, time.monotonic() + 60)
    queue_work(QUEUED_SECONDS)
    tensor = group.all_reduce(torch.ones(1 << 20, device=DEVICE))
    begun = time.monotonic()
    released: list[float] = []

    def release() -> None:
        group.release()
        released.append(time.monotonic() - begun)

    control = threading.Thread(target=release)
    control.start()
    tensor.sum().item()
    out = time.monotonic() - begun
    control.join()
    group.close()
    freed = time.monotonic() - begun
    return [
        Row("D5", "the control thread is not held up", "holds" if released[0] < 0.1 else "fails",
            f"{released[0] * 1e3:.2f} ms"),
        Row("D5", "an abort waits for what is queued", "confirmed" if freed > 0.5 * QUEUED_SECONDS else "refuted",
            f"{QUEUED_SECONDS} s queued: the compute thread is out after {out:.3f} s, all is freed after {freed:.3f}"),
    ]  # fmt: skip


if __name__ == "__main__":
    os.environ.update(NCCL_VARIABLES)
    answer(rows())
