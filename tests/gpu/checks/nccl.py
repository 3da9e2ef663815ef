"""D3, D18: torch's threads beside a communicator, and what a collective costs its host. With one rank: NCCL refuses two
on one GPU."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.gpu.findings import Row, answer
from torch._C._distributed_c10d import HashStore, PrefixStore, Store

from lockstep_runtime.distributed.nccl import NcclCommunicator
from lockstep_runtime.host.torch_environment import NCCL_VARIABLES

DEVICE = torch.device("cuda", 0)
WATCHDOG = "pt_nccl_watchdg"
EPOCHS, CALLS = 5, 1000
OF_TORCH = "--of-torch"


def threads() -> list[str]:
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]


def microseconds(all_reduce: Any) -> float:
    """Of the host, for one small all-reduce: half the hidden state of a token."""
    tensor = torch.ones(4096, device=DEVICE, dtype=torch.bfloat16)
    found = []
    for _ in range(5):
        torch.cuda.synchronize()
        begun = time.monotonic()
        for _ in range(CALLS // 5):
            all_reduce(tensor)
        found.append((time.monotonic() - begun) / (CALLS // 5) * 1e6)
        torch.cuda.synchronize()
    return statistics.median(found)


def of_torch() -> None:
    """As torch has it by itself: prints whether there is a watchdog, and the microseconds."""
    group: Any = dist.ProcessGroupNCCL(HashStore(), 0, 1, dist.ProcessGroupNCCL.Options())
    group.eager_connect_single_device(DEVICE)
    options = dist.AllreduceOptions()
    options.asyncOp = False
    cost = microseconds(lambda tensor: group.allreduce([tensor], options))
    print(int(WATCHDOG in threads()), cost)
    group.abort()


def rows() -> list[Row]:
    plain = {name: value for name, value in os.environ.items() if name not in NCCL_VARIABLES}
    stock = subprocess.run(
        [sys.executable, "-m", "tests.gpu.checks.nccl", OF_TORCH], env=plain, capture_output=True, text=True, timeout=50
    )
    watched, by_torch = [*stock.stdout.split(), "nothing", "nan"][:2]
    store: Store = HashStore()
    begun, made, freed, seen = time.monotonic(), [], [], False
    for epoch in range(EPOCHS):
        begun = time.monotonic()
        group = NcclCommunicator(PrefixStore(f"epoch-{epoch}", store), 0, 1, DEVICE, time.monotonic() + 60)
        made.append(time.monotonic() - begun)
        seen |= WATCHDOG in threads()
        ours = microseconds(group.all_reduce)
        begun = time.monotonic()
        group.close()
        freed.append(time.monotonic() - begun)
    return [
        Row("D3", "torch starts a watchdog by itself", "confirmed" if watched == "1" else "refuted",
            f"{WATCHDOG} seen: {watched}"),
        Row("D3", "with our variables there is none", "fails" if seen else "holds", f"{EPOCHS} epochs"),
        Row("D18", "torch's recorder and events cost ~10 us", "measured",
            f"{float(by_torch):.1f} us by itself, {ours:.1f} as we call it"),
        Row("D4", "made and freed again and again", "measured",
            f"first {made[0]:.2f} s, then {statistics.median(made[1:]):.3f}; freed in {statistics.median(freed):.3f}"),
    ]  # fmt: skip


if __name__ == "__main__":
    if OF_TORCH in sys.argv:
        of_torch()
    else:
        os.environ.update(NCCL_VARIABLES)
        answer(rows())
