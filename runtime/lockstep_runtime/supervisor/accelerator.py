"""What `auto` means on this machine: settled once, by the supervisor, for all of its ranks. Imports no torch.

Decided by each rank for itself, a rank whose driver fails would become a rank on a CPU: alone in its group, or Ready
and a hundred times slower.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from lockstep_runtime.config import ServeConfig

_HIDDEN: Final = frozenset({"", "-1", "none", "NoDevFiles", "void"})


def settle(config: ServeConfig, *, gpus: bool) -> ServeConfig:
    """The config with neither device nor backend left at `auto`. `gpus`: there are GPUs, and a torch that can use them.

    One that is named decides the other: nccl computes on GPUs, and GPUs without nccl have to be asked for.
    """
    device, backend = config.device, config.backend
    if device == "auto":
        device = "cuda" if backend == "nccl" or (backend == "auto" and gpus) else "cpu"
    if backend == "auto":
        backend = "nccl" if device == "cuda" else "cpu"
    return msgspec.structs.replace(config, device=device, backend=backend)


def has_gpus(environment: Mapping[str, str], devices: Path = Path("/dev")) -> bool:
    """Whether this machine has NVIDIA GPUs that are not hidden from it, and a torch that was built for CUDA.

    By the device files, without a call of the driver's: the supervisor opens no device.
    """
    shown = environment.get("CUDA_VISIBLE_DEVICES")
    if shown is not None and shown.strip() in _HIDDEN:
        return False
    nodes = any(node.name.removeprefix("nvidia").isdigit() for node in devices.glob("nvidia*"))
    return (nodes or (devices / "dxg").exists()) and torch_knows_cuda()


def torch_knows_cuda() -> bool:
    found = importlib.util.find_spec("torch")
    folders = found.submodule_search_locations if found is not None else None
    return any((Path(folder) / "lib" / "libtorch_cuda.so").exists() for folder in folders or ())
