"""Which device a rank computes on. Pure."""

from __future__ import annotations

import torch

from lockstep_runtime.config import ServeConfig
from lockstep_runtime.weights.errors import ModelError


def choose_device(config: ServeConfig, backend: str, rank: int, visible: int) -> torch.device:
    """`backend` is 'nccl' or 'gloo', `visible` the number of GPUs here.

    Raises:
        ModelError: there are too few; the sentence says what to do.
    """
    if backend != "nccl" and config.device != "cuda":
        return torch.device("cpu")
    if not visible:
        raise ModelError(f"rank {rank} is to compute on a GPU, and CUDA sees none here")
    here = rank % config.ranks_per_pod
    if backend == "nccl" and here >= visible:
        raise ModelError(
            f"rank {rank} needs a GPU of its own: {config.ranks_per_pod} ranks run here, and CUDA sees {visible}; "
            "NCCL refuses two ranks on one"
        )
    return torch.device("cuda", here % visible)


def sharers(config: ServeConfig, visible: int) -> int:
    """Ranks of this pod that compute on the same GPU, at most."""
    return -(-config.ranks_per_pod // max(1, visible))
