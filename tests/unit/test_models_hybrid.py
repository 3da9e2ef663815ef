"""Qwen3-Next and Qwen3.5 split over ranks, held against transformers' on the same generated weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.agreement import ROUNDING, Oracle, agree, errors_in_bfloat16
from tests.support.architectures import write_random
from transformers import (
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from lockstep_runtime.layers.placement import choose_placement
from lockstep_runtime.models.registry import build_model
from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.weights.sharding import RankInfo

SMALL: dict[str, Any] = {
    "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 131, "max_position_embeddings": 2048,
    "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 12, "linear_value_head_dim": 20,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 20, "num_experts": 6, "num_experts_per_tok": 2,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
VISION = {
    "depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": 40,
    "num_position_embeddings": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    kind: Any
    config: Callable[..., Any]
    settings: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, Any] = field(default_factory=dict)  # the settings of the text model

    def make(self) -> Any:
        text = {**SMALL, **self.settings}
        if self.config in (Qwen3_5Config, Qwen3_5MoeConfig):
            return self.config(text_config=text, vision_config=VISION, **self.beside)
        return self.config(**text)


CASES = {
    "qwen3_next": Case(Qwen3NextForCausalLM, Qwen3NextConfig),
    "qwen3_next, dense and sparse layers, one kv head, biased": Case(
        Qwen3NextForCausalLM,
        Qwen3NextConfig,
        {
            "mlp_only_layers": [0], "decoder_sparse_step": 2, "num_key_value_heads": 1, "attention_bias": True,
            "norm_topk_prob": False, "head_dim": 32, "linear_num_value_heads": 4, "num_experts": 5,
            "layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"],
        },
    ),
    "qwen3_5, tied": Case(Qwen3_5ForCausalLM, Qwen3_5TextConfig, {"tie_word_embeddings": True, "vocab_size": 97}),
    "qwen3_5, kernel of 2, wide shared heads": Case(
        Qwen3_5ForCausalLM,
        Qwen3_5TextConfig,
        {
            "linear_conv_kernel_dim": 2, "linear_num_value_heads": 12, "linear_value_head_dim": 6,
            "num_hidden_layers": 3, "full_attention_interval": 2, "num_attention_heads": 8, "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
        },
    ),
    "qwen3_5 with a vision tower, tied": Case(
        Qwen3_5ForConditionalGeneration, Qwen3_5Config, beside={"tie_word_embeddings": True}
    ),
    "qwen3_5_moe": Case(Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig, {"num_experts": 9, "num_experts_per_tok": 3}),
    "qwen3_5_moe with a vision tower": Case(Qwen3_5MoeForConditionalGeneration, Qwen3_5MoeConfig),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def make(name: str) -> Oracle:
        case = CASES[name]
        return Oracle(write_random(tmp_path_factory.mktemp("model"), case.kind, case.make()), case.kind)

    return make


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_it_agrees_with_transformers(models: Any, name: str, size: int) -> None:
    agree(models(name), size)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5, tied", "qwen3_5_moe with a vision tower"])
def test_in_bfloat16_it_is_as_near_as_transformers(tmp_path: Path, name: str, size: int) -> None:
    """The median over the tokens of three models: a token whose experts are others once the router's odds are rounded,
    or whose delta nets answer nearly nothing before that is normed, is far off in one of the two or in both."""
    case, errors = CASES[name], []
    for seed in range(3):
        path = write_random(tmp_path / str(seed), case.kind, case.make(), dtype="bfloat16", seed=seed)
        errors.append(errors_in_bfloat16(path, case.kind, size))
    ours, theirs = (torch.cat(each).square().mean(1).sqrt().median() for each in zip(*errors, strict=True))
    print(f"a token's median error: {ours:.2g}, transformers' {theirs:.2g}")
    assert ours < ROUNDING * theirs


def build(settings: dict[str, Any], size: int = 1, architecture: str = "Qwen3NextForCausalLM") -> None:
    raw = {"architectures": [architecture], **SMALL, **settings}
    build_model(raw, RankInfo(0, size), choose_placement(torch.device("cpu"), torch.float32))


@pytest.mark.parametrize(
    ("settings", "size", "sizes"),
    [
        (
            {"linear_num_key_heads": 2},
            4,
            "4 attention heads and 2 kv heads and 2 linear key heads .* 4 ranks.* over 1, 2$",
        ),
        ({"linear_num_key_heads": 8, "num_attention_heads": 6}, 4, "6 attention heads.* it can over 1, 2$"),
        ({}, 3, "can't be split over 3 ranks; it can over 1, 2, 4"),
    ],
)
def test_a_size_that_the_heads_can_not_take_is_refused_with_those_they_can(
    settings: dict[str, Any], size: int, sizes: str
) -> None:
    with pytest.raises(ModelError, match=sizes):
        build(settings, size)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
        (
            {"layer_types": ["full_attention", "mamba"] * 2},
            "layers of the kind mamba; supported are full_attention, linear_attention",
        ),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 layers, and num_hidden_layers 4"),
        ({"num_key_value_heads": 3}, "4 attention heads can't share 3 kv heads"),
        ({"linear_num_value_heads": 6}, "6 linear value heads can't share 4 linear key heads"),
        ({"mlp_only_layers": [1], "intermediate_size": 0}, "intermediate_size is missing"),
        ({"num_experts_per_tok": 7}, "7 experts a token can't be chosen of 6"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.2}}, "16 numbers can't be rotated"),
        ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim"),
        ({"hidden_size": "many"}, "hidden_size"),
    ],
)
def test_a_configuration_that_is_not_supported_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        build(change)
