"""Vision towers of any shape with random weights, and pictures."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any, Final

import torch
from PIL import Image
from torch import Tensor

IMAGE_TOKEN: Final = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerShape:
    hidden: int = 32
    heads: int = 4
    intermediate: int = 52
    depth: int = 3
    out: int = 48
    positions: int = 144
    patch: int = 4

    def config(self) -> dict[str, Any]:
        return {
            "model_type": "qwen3_5_vision",
            "depth": self.depth,
            "hidden_size": self.hidden,
            "hidden_act": "gelu_pytorch_tanh",
            "intermediate_size": self.intermediate,
            "num_heads": self.heads,
            "in_channels": 3,
            "patch_size": self.patch,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": self.out,
            "num_position_embeddings": self.positions,
        }

    def processor(self) -> dict[str, Any]:
        """preprocessor_config.json"""
        return {
            "image_processor_type": "Qwen2VLImageProcessor",
            "patch_size": self.patch,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "size": {"shortest_edge": (4 * self.patch) ** 2, "longest_edge": 16777216},
            "image_mean": [0.5, 0.45, 0.4],
            "image_std": [0.5, 0.55, 0.6],
        }

    def settings(self) -> dict[str, Any]:
        return {"vision_config": self.config(), "image_token_id": IMAGE_TOKEN, "image_processor": self.processor()}


def noise(height: int, width: int, seed: int = 0) -> Tensor:
    """[height, width, 3], uint8"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.frombytes("RGB", (width, height), noise(height, width, seed).numpy().tobytes())


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    target = io.BytesIO()
    image.save(target, form, **options)
    return target.getvalue()


def data_uri(content: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
