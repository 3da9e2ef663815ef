"""D6: when what a killed process held of the device is free again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import torch
from tests.gpu.findings import Row, answer

SHARE = 0.7  # of the device
LOOK_SECONDS, LONGEST_SECONDS = 0.005, 15.0
HOLD = "--hold"


def hold(nbytes: int) -> None:
    held = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    held.fill_(1)
    torch.cuda.synchronize()
    print("held", flush=True)
    time.sleep(60)


def rows() -> list[Row]:
    free, total = torch.cuda.mem_get_info(0)
    wanted = int(min(free, SHARE * total))
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.gpu.checks.release", HOLD, str(wanted)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline().strip() == "held"
    taken = free - torch.cuda.mem_get_info(0)[0]
    os.kill(child.pid, signal.SIGKILL)
    killed = time.monotonic()
    child.wait()
    reaped = time.monotonic()
    then = torch.cuda.mem_get_info(0)[0]
    while (now := torch.cuda.mem_get_info(0)[0]) < free - 0.01 * total and time.monotonic() < reaped + LONGEST_SECONDS:
        time.sleep(LOOK_SECONDS)
    back = time.monotonic() - reaped
    late = then < free - 0.01 * total
    return [
        Row("D6", "its memory is not free when the process is", "confirmed" if late else "refuted",
            f"{taken / 1e9:.0f} GB, reaped {reaped - killed:.3f} s after SIGKILL: {(then - free + taken) / 1e9:.1f} "
            f"of them free then, {(now - free + taken) / 1e9:.1f} after {back:.3f} s more"),
        Row("D6", "it is back within ten seconds", "holds" if now >= free - 0.01 * total and back < 10 else "fails",
            f"{back:.3f} s"),
    ]  # fmt: skip


if __name__ == "__main__":
    if HOLD in sys.argv:
        hold(int(sys.argv[-1]))
    else:
        answer(rows())
