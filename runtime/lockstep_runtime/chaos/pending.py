"""Faults on purpose that a process is to find when it starts: files that its supervisor leaves for the rank.

Each is found once. They lie where the weight cache does and end with the supervisor.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from lockstep_runtime.host.shm_files import folder, owner, owner_of
from lockstep_runtime.protocol.chaos import FaultPhase, Inject, Injection

ONCE_VARIABLE: Final = "LOCKSTEP_FAULT_ONCE"  # <fault>:<rank>; the first request meets it
ON_GPU: Final = frozenset({Injection.DEVICE_ASSERT, Injection.ILLEGAL_ACCESS})
MOST_WAITING: Final = 16  # for one rank
DEVICES: Final = Path("/dev")


def why_not(fault: Inject) -> str:
    """Why it can't happen on this machine; empty when it can. torch is not asked: a supervisor has none."""
    if fault.kind in ON_GPU and not any(DEVICES.glob("nvidia[0-9]*")):
        return f"{fault.kind} happens on a GPU, and there is none here"
    return ""


def leave(environment: Mapping[str, str], fault: Inject) -> bool:
    """By the supervisor; whether it did: only so many wait for a rank."""
    place, name = folder(environment), f"lockstep-fault-{owner_of(os.getpid())}-{fault.rank}-"
    if len(list(place.glob(f"{name}*[0-9]"))) >= MOST_WAITING:
        return False
    path = place / f"{name}{time.monotonic_ns()}"
    new = path.with_suffix(".new")
    new.write_bytes(msgspec.json.encode(fault))
    new.rename(path)
    return True


def take(environment: Mapping[str, str], rank: int) -> list[Inject]:
    """By a process of the rank: all that were left for it, and nobody finds them again."""
    found = []
    for path in sorted(folder(environment).glob(f"lockstep-fault-{owner(environment)}-{rank}-*[0-9]")):
        found.append(msgspec.json.decode(path.read_bytes(), type=Inject))
        path.unlink()
    return found


def parse_once(text: str) -> Inject:
    """`sigkill:1` is a fault for rank 1.

    Raises:
        ValueError: it is malformed; the message has the format.
    """
    kind, _, rank = text.partition(":")
    if kind not in list(Injection) or not rank.isdecimal():
        raise ValueError(f"{ONCE_VARIABLE}={text!r}: write <fault>:<rank> with one of {', '.join(Injection)}")
    past_warmup = 1  # whose prefill is the first of all
    return Inject(rank=int(rank), kind=Injection(kind), phase=FaultPhase.PREFILL, skip=past_warmup)
