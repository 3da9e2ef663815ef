"""Qwen3 with experts split over ranks, held against transformers' on the same generated weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tests.support.agreement import Oracle, agree, agree_in_bfloat16
from tests.support.architectures import write_random
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from lockstep_runtime.layers.placement import place
from lockstep_runtime.models.registry import build_model
from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.weights.sharding import RankInfo

COMMON = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 131, "max_position_embeddings": 512,
    "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "every layer": {},
    "stacked in the checkpoint": {"num_hidden_layers": 1, "moe_intermediate_size": 24},
    "every second layer, tied, one kv head": {
        "decoder_sparse_step": 2, "tie_word_embeddings": True, "num_key_value_heads": 1, "num_hidden_layers": 3,
    },
    "few experts, odd sizes, biased, but for the first layer": {
        "mlp_only_layers": [0], "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 10,
        "attention_bias": True, "norm_topk_prob": False, "vocab_size": 99,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Oracle]:
    @functools.cache
    def make(name: str) -> Oracle:
        single = not name.startswith("stacked")
        config = Qwen3MoeConfig(**COMMON | SHAPES[name])
        folder = tmp_path_factory.mktemp("model")
        write_random(folder, Qwen3MoeForCausalLM, config, save_original_format=single)
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            assert any(".experts.0.up_proj.weight" in key for key in file.keys()) is single  # noqa: SIM118
        return Oracle(folder, Qwen3MoeForCausalLM)

    return make


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_it_agrees_with_transformers(oracles: Callable[[str], Oracle], name: str, size: int) -> None:
    agree(oracles(name), size)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_in_bfloat16_it_is_as_near_as_transformers(tmp_path: Path, size: int) -> None:
    config = Qwen3MoeConfig(**COMMON | {"hidden_size": 64, "num_hidden_layers": 3})
    write_random(tmp_path, Qwen3MoeForCausalLM, config, dtype="bfloat16")
    agree_in_bfloat16(tmp_path, Qwen3MoeForCausalLM, size)


def build(size: int = 1, **changes: Any) -> None:
    config = Qwen3MoeConfig(**COMMON).to_dict() | {"architectures": ["Qwen3MoeForCausalLM"]} | changes
    build_model(config, RankInfo(0, size), place(torch.device("cpu"), torch.float32, None))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_experts_per_tok": 9}, "9 experts a token can't be chosen of 8"),
        ({"num_experts": -1}, "num_experts"),
        ({"mlp_only_layers": "all"}, "mlp_only_layers"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
    ],
)
def test_a_configuration_that_is_not_supported_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        build(**change)


def test_experts_of_fewer_numbers_than_ranks_can_not_be_split() -> None:
    with pytest.raises(ModelError, match="and an MLP of 2 can't be split over 4 ranks; it can over 1, 2"):
        build(4, moe_intermediate_size=2)
    build(4, moe_intermediate_size=2, mlp_only_layers=[0, 1])
