"""config.json is read as transformers reads it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tests.support.models import ModelShape
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3MoeConfig
from transformers import Qwen3Config as Oracle
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from lockstep_runtime.layers.rotary import build_rotary
from lockstep_runtime.models.llama import LlamaSettings
from lockstep_runtime.models.mistral import MistralSettings
from lockstep_runtime.models.qwen2 import Qwen2Settings
from lockstep_runtime.models.qwen3 import Qwen3Settings
from lockstep_runtime.models.qwen3_moe import Qwen3MoeSettings
from lockstep_runtime.models.settings import DecoderSettings, read_settings
from lockstep_runtime.sources import model_config
from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.sources.model_config import (
    Architecture,
    check_supported,
    max_length,
    quantisation,
    sliding_window,
)
from lockstep_runtime.weights.checkpoint import with_dtype

PLAIN = {key: value for key, value in ModelShape(max_positions=512).config().items() if key != "rope_parameters"}
UNSUPPORTED = {"dynamic", "longrope"}

Rope = dict[str, Any]
MISSING = "missing"


def ropes() -> st.SearchStrategy[Rope | None]:
    """With and without what the type needs, under both names of the type, and some that are no scaling at all."""
    factor = {"factor": st.sampled_from([1.0, 2.0, 4, 8.0])}
    original = {"original_max_position_embeddings": st.sampled_from([128, 256, 512])}
    theta = {"rope_theta": st.sampled_from([1e4, 5e5, 1000000])}
    yarn = {
        "beta_fast": st.sampled_from([None, 16, 32.0]),
        "beta_slow": st.sampled_from([None, 1, 2.0]),
        "attention_factor": st.sampled_from([None, 0.8, 1.3]),
        "mscale": st.sampled_from([0.7, 1.0]),
        "mscale_all_dim": st.sampled_from([0.5, 1.0]),
        "truncate": st.booleans(),
    }
    bands = {"low_freq_factor": st.sampled_from([1.0, 2.0]), "high_freq_factor": st.sampled_from([4.0, 8.0])}
    factors = st.just([1.0] * 8)

    def kind(name: str, needed: dict[str, Any], optional: dict[str, Any]) -> st.SearchStrategy[Rope]:
        return st.sampled_from(["rope_type", "type"]).flatmap(
            lambda key: st.fixed_dictionaries({key: st.just(name), **needed}, optional={**theta, **optional})
        )

    return st.one_of(
        st.none(),
        st.just({}),
        st.fixed_dictionaries({}, optional=theta),
        kind("default", {}, {}),
        kind("linear", factor, {}),
        kind("yarn", factor, {**original, **yarn}),
        kind("llama3", {**factor, **bands}, original),
        kind("dynamic", factor, {}),
        kind("longrope", {"short_factor": factors, "long_factor": factors}, {**factor, **original}),
    )


CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "rope_scaling": ropes(),
        "rope_parameters": ropes(),
        "rope_theta": st.sampled_from([1e4, 1e6, 500000]),
        "original_max_position_embeddings": st.sampled_from([64, 256]),
        "max_position_embeddings": st.sampled_from([256, 32768, MISSING]),
    },
)


def oracle(raw: dict[str, Any]) -> tuple[str, torch.Tensor, float] | None:
    """The rope's type, its frequencies and its scale; None where transformers can't use the configuration."""
    try:
        config = Oracle.from_dict(copy.deepcopy(raw))
        rotary = Qwen3RotaryEmbedding(config)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return config.rope_parameters["rope_type"], rotary.inv_freq, float(rotary.attention_scaling)


@given(CONFIGS)
@settings(max_examples=400)
@example(
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_scaling": {"type": "yarn", "factor": 8.0}}
)
@example({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e6})
@example({"rope_scaling": None, "rope_theta": 1e6})
def test_rotary_embeddings_are_transformers(changes: dict[str, Any]) -> None:
    raw = {name: value for name, value in {**PLAIN, **changes}.items() if value != MISSING}
    expected = oracle(raw)
    if expected is None:
        return
    kind, frequencies, scale = expected
    read = read_settings(raw, Qwen3Settings)
    assert read.rope["rope_type"] == kind
    if kind in UNSUPPORTED:
        with pytest.raises(ModelError, match=f"the kind '{kind}'"):
            build_rotary(read.head_dim, read.rope, read.max_position_embeddings)
        return
    rotary = build_rotary(read.head_dim, read.rope, read.max_position_embeddings)
    torch.testing.assert_close(rotary.inverse_frequencies, frequencies)
    assert rotary.scale == pytest.approx(scale)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-2, 2) | st.sampled_from(["", "yarn", "auto", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["rope_type", "factor", "full_attention", "quant_method"]), inner, max_size=3)
    ),
    max_leaves=6,
)
READ = [*PLAIN, "rope_scaling", "rope_parameters", "rope_theta", "layer_types", "text_config", "quantization_config"]


@given(st.dictionaries(st.sampled_from([*READ, "use_sliding_window", "sliding_window"]), JSON, min_size=1, max_size=4))
@settings(max_examples=300)
@example({"layer_types": [[]]})
@example({"rope_parameters": {"rope_type": [1]}})
@example({"num_key_value_heads": 0})
def test_whatever_stands_in_config_json_is_read_or_named(changes: dict[str, Any]) -> None:
    raw = {**PLAIN, **changes}
    said = ""
    try:
        check_supported(raw)
        model_config.dtype_name(raw)
        max_length(raw, changes)
        read = read_settings(raw, Qwen3Settings)
        build_rotary(read.head_dim, read.rope, read.max_position_embeddings)
    except ModelError as error:
        said = str(error)
    assert not said or "config.json" in said or "quantised" in said


VALUES: dict[str, list[Any]] = {
    "num_key_value_heads": [None, 1, 2, 4],
    "head_dim": [8, 16, 64],
    "tie_word_embeddings": [True, False],
    "attention_bias": [True, False],
    "rms_norm_eps": [1e-5, 1e-6],
    "max_position_embeddings": [128, 40960],
    "use_sliding_window": [True, False],
    "sliding_window": [None, 16],
    "max_window_layers": [0, 1, 2, 28],
    "layer_types": [None, ["full_attention"] * 2, ["full_attention", "sliding_attention"]],
}


KINDS: dict[Architecture, tuple[type[DecoderSettings], Any]] = {
    Architecture.LLAMA: (LlamaSettings, LlamaConfig),
    Architecture.MISTRAL: (MistralSettings, MistralConfig),
    Architecture.QWEN2: (Qwen2Settings, Qwen2Config),
    Architecture.QWEN3: (Qwen3Settings, Oracle),
    Architecture.QWEN3_MOE: (Qwen3MoeSettings, Qwen3MoeConfig),
}
SAME = ("tie_word_embeddings", "attention_bias", "mlp_bias", "rms_norm_eps", "max_position_embeddings")


@pytest.mark.parametrize("architecture", KINDS)
@given(
    given_settings=st.fixed_dictionaries(
        {}, optional={name: st.sampled_from(values) for name, values in VALUES.items()}
    )
)
@settings(max_examples=100)
def test_settings_that_are_missing_or_null_are_transformers(
    architecture: Architecture, given_settings: dict[str, Any]
) -> None:
    kind, oracle_kind = KINDS[architecture]
    plain = {name: value for name, value in PLAIN.items() if name not in VALUES}
    raw = plain | {"architectures": [architecture]} | given_settings
    try:
        expected = oracle_kind.from_dict(copy.deepcopy(raw))
    except StrictDataclassFieldValidationError:  # null, where transformers wants a number
        return
    window = window_of(architecture, expected)
    if window == UNKNOWN:  # transformers raises once it computes
        with pytest.raises(ModelError, match="sliding windows of None"):
            read_settings(raw, kind)
        return
    read = read_settings(raw, kind)
    assert sliding_window(raw) == window
    assert read.kv_heads == expected.num_key_value_heads
    assert read.width == getattr(expected, "head_dim", None) or expected.hidden_size // expected.num_attention_heads
    for name in SAME:
        assert getattr(read, name, None) == (getattr(expected, name) if hasattr(read, name) else None)


UNKNOWN = -1


def window_of(architecture: Architecture, config: Any) -> int | None:
    """Of transformers' layers: Llama's have none, of the dense Qwens some, of the others all."""
    if architecture is Architecture.LLAMA:
        return None
    if architecture in (Architecture.QWEN2, Architecture.QWEN3):
        slides = "sliding_attention" in config.layer_types
        return (config.sliding_window or UNKNOWN) if slides else None
    return config.sliding_window  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["head_dim", "tie_word_embeddings", "rms_norm_eps", "attention_bias", "hidden_act"])
def test_null_is_as_if_it_were_not_there(name: str) -> None:
    raw = {key: value for key, value in PLAIN.items() if key != name}
    assert read_settings({**raw, name: None}, Qwen3Settings) == read_settings(raw, Qwen3Settings)


@pytest.mark.parametrize(
    ("config", "tokenizer", "expected"),
    [
        ({"max_position_embeddings": 2048}, {}, 2048),
        ({"max_position_embeddings": 40960}, {"model_max_length": 131072}, 40960),
        ({"max_position_embeddings": 2048}, {"model_max_length": 512}, 2048),
        ({}, {"model_max_length": 4096}, 4096),
        ({}, {"model_max_length": 10**30}, None),
        ({}, {}, None),
        ({"max_position_embeddings": None}, {"model_max_length": 512.0}, 512),
        ({"text_config": {"max_position_embeddings": 77}, "max_position_embeddings": 5}, {}, 77),
        # the model card's way: the scaling is added, the positions left alone
        ({"max_position_embeddings": 2048, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, {}, 8192),
        (
            {"max_position_embeddings": 40960,
             "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}, {}, 131072,
        ),
        (
            {"max_position_embeddings": 131072,
             "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
            {}, 131072,
        ),
        ({"max_position_embeddings": 2048, "rope_scaling": {"type": "linear", "factor": 2}}, {}, 4096),
        ({"max_position_embeddings": 2048, "rope_scaling": {"type": "dynamic", "factor": 2.5}}, {}, 5120),
        ({"max_position_embeddings": 2048, "rope_scaling": {"type": "yarn", "factor": None}}, {}, 2048),
        (
            {"max_position_embeddings": 131072,
             "rope_scaling": {"type": "llama3", "factor": 8, "original_max_position_embeddings": 8192}}, {}, 131072,
        ),
    ],
)  # fmt: skip
def test_how_long_a_context_may_be(config: dict[str, Any], tokenizer: dict[str, Any], expected: int | None) -> None:
    assert max_length(config, tokenizer) == expected


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"rope_type": "linear"}, "gives factor None"),
        ({"rope_type": "yarn", "factor": "four"}, "gives factor 'four'"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 4}, "not more than"),
        ({"rope_type": "llama3", "factor": 8.0}, "gives low_freq_factor None"),
        ({"rope_type": "su", "factor": 8.0}, "the kind 'su'; known are default, linear, yarn, llama3"),
        ({"rope_theta": 0}, "gives rope_theta 0"),
    ],
)
def test_a_scaling_without_what_it_needs_is_named(rope: dict[str, Any], words: str) -> None:
    read = read_settings({**PLAIN, "rope_scaling": rope}, Qwen3Settings)
    with pytest.raises(ModelError, match=words):
        build_rotary(read.head_dim, read.rope, read.max_position_embeddings)


def test_layer_types_that_share_their_rope_are_one() -> None:
    inner = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    assert read_settings({**PLAIN, "rope_parameters": {"full_attention": inner}}, Qwen3Settings).rope == inner
    other = {"full_attention": inner, "sliding_attention": {"rope_type": "default"}}
    with pytest.raises(ModelError, match="its own rope_parameters"):
        read_settings({**PLAIN, "rope_parameters": other}, Qwen3Settings)


@pytest.mark.parametrize(
    ("settings_", "method"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}, "gptq"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "fp8"),
        ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}, "bitsandbytes"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"text_config": {"quantization_config": {"quant_algo": "NVFP4"}}}, "NVFP4"),
        ({"quantization_config": None}, ""),
        ({"quantization_config": {}}, ""),
        ({}, ""),
    ],
)
def test_a_quantised_checkpoint_is_named_as_such(settings_: dict[str, Any], method: str) -> None:
    config = {**PLAIN, **settings_}
    assert quantisation(config) == method
    if not method:
        check_supported(config)
        return
    with pytest.raises(ModelError, match=rf"is quantised \({method}\)"):
        check_supported(config)


@pytest.mark.parametrize("types", [["bfloat16"], ["float16"], ["float32"], ["float32", "bfloat16", "int64"]])
@pytest.mark.parametrize("silent", [{}, {"dtype": None}, {"torch_dtype": "auto"}])
def test_a_type_that_config_json_does_not_name_is_the_weights_own(
    tmp_path: Path, types: list[str], silent: dict[str, Any]
) -> None:
    sizes = {"float32": 4, "bfloat16": 40, "float16": 40, "int64": 400}
    tensors = {name: torch.zeros(sizes[name], dtype=getattr(torch, name)) for name in types}
    save_file(tensors, tmp_path / "model.safetensors")
    raw = {key: value for key, value in PLAIN.items() if key != "dtype"}
    expected = "bfloat16" if len(types) > 1 else types[0]
    assert with_dtype(tmp_path, {**raw, **silent})["dtype"] == expected


@pytest.mark.parametrize("named", [{"dtype": "float16"}, {"torch_dtype": "float16"}, {"dtype": "torch.float16"}])
def test_a_type_that_config_json_names_is_left_alone(tmp_path: Path, named: dict[str, Any]) -> None:
    raw = {key: value for key, value in PLAIN.items() if key != "dtype"}
    assert model_config.dtype_name(with_dtype(tmp_path, {**raw, **named})) == "float16"
