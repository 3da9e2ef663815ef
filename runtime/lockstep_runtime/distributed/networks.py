"""Logs which networks NCCL can use between pods: without a library it falls back to TCP silently."""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path
from typing import Final

logger = logging.getLogger(__name__)

DEVICES: Final = Path("/sys/class/infiniband")
VERBS: Final = "libibverbs.so.1"  # NCCL loads it by this name (src/misc/ibvsymbols.cc)


@functools.cache
def tell_networks() -> None:
    """Once in a process."""
    found = sorted(one.name for one in DEVICES.glob("*"))
    lacking = "" if not found else _why_not(VERBS)
    logger.log(logging.WARNING if lacking else logging.INFO, "%s", network_sentence(found, lacking))


def network_sentence(devices: list[str], lacking: str) -> str:
    """`devices`: InfiniBand's and RoCE's; `lacking`: why their library can't be loaded. Pure."""
    if not devices:
        return "no InfiniBand or RoCE device here: NCCL goes over TCP between pods (NCCL_DEBUG=INFO logs its choice)"
    shown = ", ".join(devices[:8]) + (" and more" if len(devices) > 8 else "")
    if lacking:
        return f"{shown} can't be used, so NCCL goes over TCP between pods: install {VERBS} in the image ({lacking})"
    return f"NCCL may use {shown} between pods (NCCL_DEBUG=INFO logs its choice)"


def _why_not(library: str) -> str:
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return str(error)
    return ""
