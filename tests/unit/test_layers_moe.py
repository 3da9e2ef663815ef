"""Experts split over ranks, held against transformers' blocks on the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3NextConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextSparseMoeBlock

from lockstep_runtime.distributed.join import SingleCommunicator
from lockstep_runtime.layers import grouped_product
from lockstep_runtime.layers.moe import Experts, MoeShape, SingleExperts, SparseMoe, StackedExperts
from lockstep_runtime.layers.placement import place
from lockstep_runtime.weights.load import load_weights
from lockstep_runtime.weights.sharding import RankInfo

PREFIX = "model.layers.0.mlp"
PLACEMENT = place(torch.device("cpu"), torch.float32, None)
SHAPES = {
    "some of several": MoeShape(hidden=24, inner=16, experts=8, chosen=3, normalized=True),
    "shares as they are": MoeShape(hidden=24, inner=16, experts=8, chosen=2, normalized=False),
    "all of them": MoeShape(hidden=16, inner=8, experts=4, chosen=4, normalized=True),
    "uneven slices, fewer experts than ranks": MoeShape(hidden=20, inner=10, experts=3, chosen=2, normalized=True),
    "one": MoeShape(hidden=16, inner=8, experts=1, chosen=1, normalized=False),
    "a shared one": MoeShape(hidden=24, inner=16, experts=6, chosen=2, normalized=True, shared_inner=20),
}


def block_of(shape: MoeShape) -> Any:
    """transformers', with random weights."""
    settings = {
        "hidden_size": shape.hidden,
        "moe_intermediate_size": shape.inner,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.chosen,
        "norm_topk_prob": shape.normalized,
    }
    block = (
        Qwen3NextSparseMoeBlock(Qwen3NextConfig(**settings, shared_expert_intermediate_size=shape.shared_inner))
        if shape.shared_inner
        else Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**settings))
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return block


def write(folder: Path, block: Any, *, stacked: bool = False) -> Path:
    """The block's tensors as checkpoints have them."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in block.state_dict().items():
        if stacked or not name.startswith("experts."):
            tensors[f"{PREFIX}.{name}"] = tensor
            continue
        names = ("gate_proj", "up_proj") if name == "experts.gate_up_proj" else ("down_proj",)
        for number, expert in enumerate(tensor):
            for part, half in zip(names, expert.chunk(len(names)), strict=True):
                tensors[f"{PREFIX}.experts.{number}.{part}.weight"] = half.clone()
    save_file(tensors, folder / "model.safetensors")
    return folder


def inputs(shape: MoeShape, tokens: int) -> Tensor:
    return torch.randn(tokens, shape.hidden, generator=torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_the_ranks_parts_add_up_to_transformers_block(tmp_path: Path, name: str, size: int, stacked: bool) -> None:
    shape = SHAPES[name]
    block = block_of(shape)
    write(tmp_path, block, stacked=stacked)
    with torch.inference_mode():
        parts = [SparseMoe(PREFIX, shape, RankInfo(rank, size), PLACEMENT) for rank in range(size)]
        for part in parts:
            load_weights(tmp_path, part.weights(), lambda done, total: None)
        for tokens in (1, 2, 37):
            x = inputs(shape, tokens)
            found = sum((part(x, SingleCommunicator()) for part in parts), torch.zeros_like(x))
            torch.testing.assert_close(found, block(x[None])[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpus_way_gives_what_a_cpus_gives(tmp_path: Path, name: str, grouped: bool, dtype: torch.dtype) -> None:
    """Tried here on a CPU; of sizes that the grouped product can't take, too."""
    shape = SHAPES[name]
    placement = replace(place(torch.device("cpu"), dtype, None), grouped=grouped)
    write(tmp_path, block_of(shape))
    ways: list[Experts] = [
        kind(f"{PREFIX}.experts", shape, RankInfo(0, 2), placement) for kind in (SingleExperts, StackedExperts)
    ]
    with torch.inference_mode():
        for way in ways:
            load_weights(tmp_path, way.weights(), lambda done, total: None)
        for tokens in (1, 9):
            x = inputs(shape, tokens).to(dtype)
            shares, experts = inputs(shape, tokens)[:, : shape.experts].softmax(-1).topk(shape.chosen)
            one, other = (way(x, experts, shares.to(dtype)) for way in ways)
            torch.testing.assert_close(one, other, atol=4 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)


def test_a_grouped_product_is_used_where_it_works() -> None:
    cpu = torch.device("cpu")
    assert grouped_product.works(cpu, torch.float32)
    assert grouped_product.works(cpu, torch.bfloat16)
    assert not grouped_product.works(cpu, torch.float64)
    assert not grouped_product.works(torch.device("meta"), torch.float32)  # there is nothing to compare
