"""Llama, Qwen2 and Mistral split over ranks, held against transformers' on the same generated weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.agreement import Oracle, agree, agree_in_bfloat16
from tests.support.architectures import write_random
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lockstep_runtime.layers.placement import place
from lockstep_runtime.models.registry import build_model
from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.sources.model_config import max_length
from lockstep_runtime.weights.sharding import RankInfo

COMMON = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 131, "max_position_embeddings": 512,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}
KINDS = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM, "mistral": MistralForCausalLM}
SHAPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama 3": (LlamaConfig, {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama, biased, one kv head, odd sizes": (
        LlamaConfig,
        {"attention_bias": True, "mlp_bias": True, "num_attention_heads": 8, "num_key_value_heads": 1,
         "vocab_size": 257, "intermediate_size": 50},
    ),
    "llama, every head its own, wide": (LlamaConfig, {"num_key_value_heads": None, "head_dim": 32}),
    "qwen 2.5": (Qwen2Config, {"rope_parameters": YARN}),
    "qwen 2.5, tied, one kv head": (
        Qwen2Config, {"tie_word_embeddings": True, "num_key_value_heads": 1, "hidden_size": 40, "vocab_size": 99}
    ),
    "mistral": (MistralConfig, {"sliding_window": None, "head_dim": 16, "intermediate_size": 66}),
    "mistral with a window": (MistralConfig, {"sliding_window": 300, "num_key_value_heads": 4}),
}  # fmt: skip


@pytest.fixture(scope="module")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Oracle]:
    @functools.cache
    def make(name: str) -> Oracle:
        kind, changes = SHAPES[name]
        config = kind(**COMMON | changes)
        model = KINDS[config.model_type]
        return Oracle(write_random(tmp_path_factory.mktemp("model"), model, config), model)

    return make


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_it_agrees_with_transformers(oracles: Callable[[str], Oracle], name: str, size: int) -> None:
    agree(oracles(name), size)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config, MistralConfig])
def test_in_bfloat16_it_is_as_near_as_transformers(tmp_path: Path, kind: Any, size: int) -> None:
    config = kind(**COMMON | {"hidden_size": 64, "num_hidden_layers": 3})
    model = KINDS[config.model_type]
    agree_in_bfloat16(write_random(tmp_path, model, config, dtype="bfloat16"), model, size)


def build(kind: Any, size: int = 1, **changes: Any) -> int:
    """Its length."""
    config = kind(**COMMON).to_dict() | {"architectures": [KINDS[kind.model_type].__name__]} | changes
    placement = place(torch.device("cpu"), torch.float32, None)
    length = build_model(config, RankInfo(0, size), placement).max_positions
    assert length == max_length(config, {})
    return length


def test_a_window_bounds_the_length() -> None:
    """Within it every token sees all before it, and that is what attention here computes."""
    assert build(MistralConfig, sliding_window=None) == 512
    assert build(MistralConfig, sliding_window=512) == 512
    assert build(MistralConfig, sliding_window=100) == 100
    assert build(Qwen2Config, use_sliding_window=False, sliding_window=100, max_window_layers=0) == 512
    sliding: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 100, "layer_types": None}
    assert build(Qwen2Config, **sliding, max_window_layers=1) == 100
    assert build(Qwen2Config, **sliding, max_window_layers=2) == 512
    sliding["layer_types"] = ["full_attention", "sliding_attention"]
    assert build(Qwen2Config, **sliding, max_window_layers=2) == 100
    assert build(LlamaConfig, sliding_window=100) == 512  # it has none


def test_transformers_default_of_mistral_is_a_window() -> None:
    """As in the configuration of its first release."""
    config = MistralConfig(**COMMON).to_dict() | {"architectures": ["MistralForCausalLM"]}
    del config["sliding_window"]
    assert max_length(config | {"max_position_embeddings": 32768}, {}) == MistralConfig().sliding_window


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        (LlamaConfig, {"hidden_act": "gelu"}, "hidden_act is gelu"),
        (LlamaConfig, {"mlp_bias": "yes"}, "mlp_bias"),
        (LlamaConfig, {"head_dim": 7}, "heads of 7 numbers"),
        (LlamaConfig, {"head_dim": None, "hidden_size": 3}, "heads of 0 numbers"),
        (Qwen2Config, {"layer_types": ["full_attention", "chunked_attention"]}, "the kind chunked_attention"),
        (Qwen2Config, {"use_sliding_window": True, "sliding_window": "x", "max_window_layers": 0}, "windows of 'x'"),
        (MistralConfig, {"sliding_window": -5}, "windows of -5"),
        (MistralConfig, {"num_key_value_heads": 3}, "4 attention heads can't share 3 kv heads"),
    ],
)
def test_a_configuration_that_is_not_supported_is_named(kind: Any, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        build(kind, **{"layer_types": None, **change})


def test_an_mlp_of_fewer_numbers_than_ranks_can_not_be_split() -> None:
    with pytest.raises(ModelError, match="2 kv heads and an MLP of 3 can't be split over 4 ranks; it can over 1, 2"):
        build(LlamaConfig, 4, intermediate_size=3)
