"""Qwen3 checkpoints of any shape with random weights, in the hub's layout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    hidden: int = 48
    intermediate: int = 80
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    vocabulary: int = 131
    tied: bool = False
    bias: bool = False
    max_positions: int = 2048
    dtype: str = "float32"
    rope_scaling: dict[str, Any] | None = None

    def config(self) -> dict[str, Any]:
        rope = {"rope_theta": 1e6, "rope_type": "default", **(self.rope_scaling or {})}
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "attention_bias": self.bias,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "rope_parameters": rope,
            "dtype": self.dtype,
            "eos_token_id": None,
            "bos_token_id": None,
        }


QWEN3_0_6B = ModelShape(
    hidden=1024, intermediate=3072, layers=28, heads=16, kv_heads=8, head_dim=128, vocabulary=151936, tied=True,
    max_positions=40960, dtype="bfloat16",
)  # fmt: skip


def write_model(directory: Path, shape: ModelShape, *, seed: int = 0, shards: int = 1) -> Path:
    """Write config.json and the weights into `directory`; with several shards, their index too."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(shape.config(), indent=1))
    tensors = list(random_tensors(shape, seed))
    if shards == 1:
        save_file(dict(tensors), directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(tensors[shard::shards])
        save_file(part, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def random_tensors(shape: ModelShape, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Scaled so that hidden states stay of order one and logits differ enough for greedy choices to be clear."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, shape.dtype)

    def normal(*size: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return torch.randn(*size, generator=generator).mul_(scale).add_(mean).to(dtype)

    hidden, inner, wide = shape.hidden, shape.intermediate, shape.heads * shape.head_dim
    narrow = shape.kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", normal(shape.vocabulary, hidden, scale=hidden**-0.5)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        for name, rows, columns in (
            ("self_attn.q_proj", wide, hidden),
            ("self_attn.k_proj", narrow, hidden),
            ("self_attn.v_proj", narrow, hidden),
            ("self_attn.o_proj", hidden, wide),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            yield f"{prefix}.{name}.weight", normal(rows, columns, scale=columns**-0.5)
            if shape.bias and name.startswith("self_attn"):
                yield f"{prefix}.{name}.bias", normal(rows, scale=0.1)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{norm}.weight", normal(hidden, scale=0.1, mean=1.0)
        for norm in ("self_attn.q_norm", "self_attn.k_norm"):
            yield f"{prefix}.{norm}.weight", normal(shape.head_dim, scale=0.1, mean=1.0)
    yield "model.norm.weight", normal(hidden, scale=0.1, mean=1.0)
    if not shape.tied:
        yield "lm_head.weight", normal(shape.vocabulary, hidden, scale=hidden**-0.5)
