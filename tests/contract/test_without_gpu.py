"""A group that is to compute on GPUs, on a machine without one: it says so at once, and never computes on its CPU."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import torch
from tests.support.serve import Served, served

from lockstep_runtime.protocol.status import GroupState, RankState

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
SECONDS = 60.0  # importing torch on a busy machine; what follows takes no time


def state_of(serve: Served) -> GroupState | None:
    """None: nobody answers yet."""
    try:
        return serve.status().state
    except httpx.HTTPError:
        return None


@pytest.mark.parametrize("arguments", [("--device", "cuda"), ("--tensor-parallel-size", "2", "--backend", "nccl")])
def test_a_rank_without_its_gpu_poisons_the_group_with_its_name(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    with served(tmp_path, *arguments) as serve:
        serve.until(lambda: state_of(serve) is GroupState.POISONED, "it is poisoned", SECONDS)
        status = serve.status()
        assert "is to compute on a GPU, and CUDA sees none here" in status.message
        assert status.ranks[0].state is RankState.FAILED
        assert not serve.is_ready()
