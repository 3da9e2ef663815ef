"""A small Qwen3.5 with a vision tower, random weights and a tokenizer of bytes; and transformers' answers with it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from tests.support.vision import TowerShape
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

SPECIAL: Final = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
IMAGE_TOKEN: Final = 256 + SPECIAL.index("<|image_pad|>")
TEMPLATE: Final = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{ message.content }}"
    "{%- else %}{%- for item in message.content %}"
    "{%- if item.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- else %}{{ item.text }}{%- endif %}{%- endfor %}{%- endif %}"
    "{{ '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
EXPERTS: Final = {
    "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 32,
}  # fmt: skip
TOWER: Final = TowerShape(patch=8, positions=256, out=48)


def tokenizer() -> Tokenizer:
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return made


def settings(tower: TowerShape, layers: tuple[str, ...], *, experts: bool = False) -> Any:
    of_text = partial(Qwen3_5MoeTextConfig, **EXPERTS) if experts else partial(Qwen3_5TextConfig, intermediate_size=80)
    text = of_text(
        vocab_size=256 + len(SPECIAL), hidden_size=tower.out, num_hidden_layers=len(layers),
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, linear_num_key_heads=4, linear_num_value_heads=8,
        linear_key_head_dim=8, linear_value_head_dim=8, layer_types=list(layers), max_position_embeddings=4096,
        rope_parameters={
            "rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25,
            "mrope_section": [2, 1, 1], "mrope_interleaved": True,
        },
        eos_token_id=None, bos_token_id=None, dtype="float32",
    )  # fmt: skip
    special = {name: 256 + number for number, name in enumerate(SPECIAL)}
    return (Qwen3_5MoeConfig if experts else Qwen3_5Config)(
        text_config=text.to_dict(), vision_config=tower.config(), tie_word_embeddings=False,
        image_token_id=special["<|image_pad|>"], video_token_id=special["<|video_pad|>"],
        vision_start_token_id=special["<|vision_start|>"], vision_end_token_id=special["<|vision_end|>"],
        dtype="float32",
    )  # fmt: skip


def write_vision_model(
    directory: Path,
    tower: TowerShape = TOWER,
    layers: tuple[str, ...] = ("linear_attention", "full_attention") * 2,
    seed: int = 0,
    *,
    experts: bool = False,
) -> Path:
    """As it would lie on the hub."""
    torch.manual_seed(seed)
    kind = Qwen3_5MoeForConditionalGeneration if experts else Qwen3_5ForConditionalGeneration
    model = kind(settings(tower, layers, experts=experts))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        scale = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        around = 1.0 if name.endswith("norm.weight") and "visual" in name else 0.0
        if parameter.ndim == 1 and not name.endswith(("A_log", "dt_bias")):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale + around)
        elif parameter.ndim > 1:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model.save_pretrained(directory)
    tokenizer().save(str(directory / "tokenizer.json"))
    text = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(text))
    (directory / "preprocessor_config.json").write_text(json.dumps(tower.processor()))
    (directory / "generation_config.json").write_text("{}")
    for file in directory.iterdir():
        file.chmod(0o644)  # tensors are saved for their owner alone, and pods have a user of their own
    return directory


@dataclass
class Oracle:
    """transformers' processor and model."""

    directory: Path
    tower: TowerShape = TOWER
    template: str = TEMPLATE
    experts: bool = False

    def __post_init__(self) -> None:
        kind = Qwen3_5MoeForConditionalGeneration if self.experts else Qwen3_5ForConditionalGeneration
        self.model = kind.from_pretrained(self.directory, dtype=torch.float32).eval()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer())
        budget = self.tower.positions * self.tower.patch**2
        size = {"shortest_edge": (4 * self.tower.patch) ** 2, "longest_edge": budget}
        self.processor = Qwen2VLImageProcessorPil(**self.tower.processor() | {"size": size})

    def inputs(self, messages: list[dict[str, Any]], images: list[Image.Image]) -> dict[str, torch.Tensor]:
        """As `Qwen3VLProcessor` makes them, which needs torchvision for videos."""
        text = self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, tokenize=False, add_generation_prompt=True
        )
        given = dict(self.processor(images=images, return_tensors="pt")) if images else {}
        counts = iter(given["image_grid_thw"].prod(-1) // 4) if images else iter(())
        first, *parts = text.split("<|image_pad|>")
        for part in parts:
            first += "<|image_pad|>" * int(next(counts)) + part
        ids = torch.tensor([self.tokenizer(first, add_special_tokens=False)["input_ids"]])
        kinds = (ids == IMAGE_TOKEN).int()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds, **given}

    def greedy(self, messages: list[dict[str, Any]], images: list[Image.Image], tokens: int) -> tuple[list[int], int]:
        """The likeliest tokens, and how many tokens the prompt has."""
        inputs = self.inputs(messages, images)
        with torch.inference_mode():
            found = self.model.generate(**inputs, do_sample=False, max_new_tokens=tokens, pad_token_id=0)
        length = inputs["input_ids"].shape[1]
        return found[0, length:].tolist(), length
