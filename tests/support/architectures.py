"""Small checkpoints of any architecture, with random weights, as transformers writes them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor


def write_random(folder: Path, kind: Any, config: Any, *, seed: int = 0, dtype: str = "float32", **saving: Any) -> Path:
    """A model of transformers' class `kind` in the hub's layout.

    Args:
        config: transformers' configuration of it.
        saving: what else `save_pretrained` takes, such as `max_shard_size` or `save_original_format`.
    """
    config.dtype = dtype
    model = kind(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_drawn(name, parameter, generator))
    model.to(getattr(torch, dtype)).save_pretrained(folder, **saving)
    return folder


def _drawn(name: str, initial: Tensor, generator: torch.Generator) -> Tensor:
    """Scaled so that hidden states stay of order one and logits differ enough for greedy choices to be clear.

    What has one dimension (norms, biases) is scattered around what it is initialised with.
    """
    noise = torch.randn(initial.shape, generator=generator)
    if name.endswith("A_log"):  # so that delta nets remember from one to a hundred tokens
        return 1.5 * noise - 3
    if initial.dim() == 1:
        return initial + 0.1 * noise
    inputs = initial.shape[-1] if "experts" in name else math.prod(initial.shape[1:])
    return noise.mul_(inputs**-0.5)


def write_words(folder: Path, vocabulary: int) -> None:
    """A tokenizer whose every token is a word of its own: w0, w1 and so on."""
    tokenizer = Tokenizer(WordLevel({f"w{token}": token for token in range(vocabulary)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
