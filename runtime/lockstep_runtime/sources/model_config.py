"""Parses config.json as transformers does. Pure, without torch: the engine uses it too.

Sources: transformers' `RotaryEmbeddingConfigMixin` (modeling_rope_utils.py) for the rope settings, vLLM's
`_get_and_verify_max_len` for the lengths that a scaling implies.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, Final

from lockstep_runtime.protocol.bus import LoadFailure
from lockstep_runtime.sources.errors import ModelError

DEFAULT_WINDOW: Final = 4096  # transformers', of models whose layers slide
FIRST_SLIDING: Final = 28  # transformers' `max_window_layers`
DEFAULT_THETA: Final = 10_000.0  # transformers', whatever the model
MAX_TOKENIZER_LENGTH: Final = 10**9  # beyond it `model_max_length` means "none"


class Architecture(enum.StrEnum):
    """As config.json names them; `models.registry` has a builder for each."""

    LLAMA = "LlamaForCausalLM"
    MISTRAL = "MistralForCausalLM"
    QWEN2 = "Qwen2ForCausalLM"
    QWEN3 = "Qwen3ForCausalLM"
    QWEN3_MOE = "Qwen3MoeForCausalLM"
    QWEN3_NEXT = "Qwen3NextForCausalLM"
    QWEN3_5 = "Qwen3_5ForCausalLM"
    QWEN3_5_MOE = "Qwen3_5MoeForCausalLM"
    QWEN3_5_VISION = "Qwen3_5ForConditionalGeneration"
    QWEN3_5_MOE_VISION = "Qwen3_5MoeForConditionalGeneration"


def check_supported(config: Mapping[str, Any]) -> Architecture:
    """Which architecture it is.

    Raises:
        ModelError: an unknown one, or a quantised checkpoint.
    """
    names = _architectures(config)
    found = next((one for one in Architecture if one in names), None)
    if found is None:
        listed = ", ".join(names) or "none"
        raise _permanent(f"config.json names the architecture {listed}; Lockstep knows {', '.join(Architecture)}")
    if method := quantisation(config):
        raise _permanent(
            f"the checkpoint is quantised ({method}), and Lockstep reads float32, float16 and bfloat16 only: "
            "give the model's checkpoint that is not quantised"
        )
    return found


def _architectures(config: Mapping[str, Any]) -> list[str]:
    named = config.get("architectures")
    return [str(name) for name in named] if isinstance(named, list) else []


def quantisation(config: Mapping[str, Any]) -> str:
    """The method's name (awq, gptq, fp8, bitsandbytes, compressed-tensors …); empty: it is not quantised."""
    for place in (config, text_config(config)):
        for key in ("quantization_config", "compression_config", "quantization"):
            found = place.get(key)
            if isinstance(found, Mapping) and found:
                return str(found.get("quant_method") or found.get("quant_algo") or _bitsandbytes(found) or "unnamed")
            if isinstance(found, str) and found:
                return found
    return ""


def _bitsandbytes(settings: Mapping[str, Any]) -> str:
    """Its older files name no method."""
    return "bitsandbytes" if any("load_in_" in name for name in settings) else ""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of a model that has other parts too."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_type`, `rope_theta` and what else the type needs, from wherever it stands.

    As in transformers: a `rope_scaling` that is not empty replaces `rope_parameters`; `rope_theta` within goes before
    the one beside; the type may be called `type`.

    Raises:
        ModelError: settings for each layer type apart, which no supported model uses.
    """
    rope = _mapping(config, "rope_scaling") or _mapping(config, "rope_parameters")
    named = config.get("layer_types")
    layer_types = named if isinstance(named, list) and named else ["full_attention", "sliding_attention"]
    nested = [key for key in layer_types if isinstance(key, str) and isinstance(rope.get(key), Mapping)]
    if nested:
        inner = [dict(rope[key]) for key in dict.fromkeys(nested)]
        if any(one != inner[0] for one in inner):
            raise _permanent("config.json gives each layer type its own rope_parameters, which Lockstep does not know")
        rope = inner[0]
    found = {**rope}
    if found.get("rope_theta") is None:
        theta = config.get("rope_theta")
        found["rope_theta"] = DEFAULT_THETA if theta is None else theta
    if found.get("rope_type") is None:
        found["rope_type"] = rope.get("type") or "default"
    if not isinstance(found["rope_type"], str):
        raise _permanent(f"config.json: rope_type is {found['rope_type']!r}, where a name should be")
    if found["rope_type"] in ("yarn", "longrope", "llama3"):
        beside = config.get("original_max_position_embeddings")
        if beside is not None:
            found["original_max_position_embeddings"] = beside
        elif found.get("original_max_position_embeddings") is None:
            found["original_max_position_embeddings"] = config.get("max_position_embeddings")
    return found


def _mapping(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = config.get(key)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise _permanent(f"config.json: {key} should be an object")
    return dict(found)


def max_length(config: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> int | None:
    """The model's maximum length in tokens: its positions times its rope scaling; None if no file has it.

    A tokenizer's `model_max_length` counts only where config.json names no length: it is often another model's. Where
    layers have a sliding window it is the window, within which they see everything, as all attention here does.
    """
    length, window = _positions(config, tokenizer_config), sliding_window(config)
    return min((one for one in (length, window) if one is not None), default=None)


def sliding_window(config: Mapping[str, Any]) -> int | None:
    """How many tokens the layers that slide see, the token itself included; None: no layer slides.

    Llama has none. Mistral's layers all slide, unless `sliding_window` is null; a Qwen's where `use_sliding_window`
    says so, and of the dense ones those that `layer_types` names, or from `max_window_layers` on.

    Raises:
        ModelError: layers slide over nobody knows how much.
    """
    inner, named = text_config(config), _architectures(config)
    if Architecture.LLAMA in named:
        return None
    always = Architecture.MISTRAL in named
    window = inner.get("sliding_window", DEFAULT_WINDOW) if always or inner.get("use_sliding_window") else None
    slides = window is not None
    if not always and Architecture.QWEN3_MOE not in named:
        slides = _some_slide(inner, slides)
    if slides and _positive(window) is None:
        raise _permanent(f"config.json asks for sliding windows of {window!r} tokens, where a number should be")
    return _positive(window) if slides else None


def _some_slide(inner: Mapping[str, Any], wanted: bool) -> bool:
    kinds, first = inner.get("layer_types"), inner.get("max_window_layers", FIRST_SLIDING)
    if isinstance(kinds, list):
        return "sliding_attention" in kinds
    layers = _positive(inner.get("num_hidden_layers")) or 0
    return wanted and (not isinstance(first, int) or first < layers)


def _positions(config: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> int | None:
    inner = text_config(config)
    positions = _positive(inner.get("max_position_embeddings"))
    if positions is None:
        length = _positive(tokenizer_config.get("model_max_length"))
        return length if length and length < MAX_TOKENIZER_LENGTH else None
    rope = rope_parameters(inner)
    factor = rope.get("factor")
    if not isinstance(factor, int | float) or isinstance(factor, bool) or factor <= 1:
        return positions
    match rope["rope_type"]:
        case "yarn":
            return int((_positive(rope.get("original_max_position_embeddings")) or positions) * factor)
        case "linear" | "dynamic":
            return int(positions * factor)
        case _:  # longrope and llama3 give the longer length themselves
            return positions


def _positive(value: object) -> int | None:
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) and value > 0 else None


def _permanent(message: str) -> ModelError:
    return ModelError(message, kind=LoadFailure.PERMANENT)


def dtype_name(config: Mapping[str, Any]) -> str | None:
    """The type that config.json names, as torch calls it; None: none."""
    for place in (config, text_config(config)):
        for key in ("dtype", "torch_dtype"):
            found = place.get(key)
            if isinstance(found, str) and found != "auto":
                return found.removeprefix("torch.")
    return None
