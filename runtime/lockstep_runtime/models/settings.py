"""What decoders read from config.json, with transformers' defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, TypeVar

import msgspec

from lockstep_runtime.protocol.bus import LoadFailure
from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.sources.model_config import max_length, rope_parameters
from lockstep_runtime.weights.sharding import RankInfo, tensor_parallel_sizes

Count = Annotated[int, msgspec.Meta(ge=1)]
_DERIVED: Final = {"rope", "max_length"}
_NULLABLE: Final = {"num_key_value_heads"}  # null is no default there, but has a meaning
_KINDS: Final = {"full_attention", "sliding_attention"}


class DecoderSettings(msgspec.Struct, frozen=True, kw_only=True):
    """An architecture's own settings, and what has another default there, are in a subclass."""

    positions: ClassVar[int] = 2048  # where config.json is silent

    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count | None = None  # None: as many as attention heads
    vocab_size: Count
    head_dim: Count | None = None  # None: the hidden size over the heads
    rms_norm_eps: float = 1e-6
    max_position_embeddings: Count
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    layer_types: list[str] | None = None
    rope: dict[str, Any]  # as `rope_parameters` found it
    max_length: int  # with what the rope's scaling adds, within the window of layers that slide

    @property
    def kv_heads(self) -> int:
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def width(self) -> int:
        """Of a head."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def rotated(self) -> int:
        """How much of a head's width."""
        return self.width


Settings = TypeVar("Settings", bound=DecoderSettings)


def read_settings(raw: Mapping[str, Any], kind: type[Settings]) -> Settings:
    """
    Raises:
        ModelError: a setting is missing, malformed or not supported.
    """
    known = {name: raw[name] for name in kind.__struct_fields__ if name in raw and name not in _DERIVED}
    given = {name: value for name, value in known.items() if value is not None or name in _NULLABLE}
    given.setdefault("max_position_embeddings", kind.positions)
    placed = {**raw, "max_position_embeddings": given["max_position_embeddings"]}
    derived = {"rope": rope_parameters(placed), "max_length": max_length(placed, {})}
    try:
        return msgspec.convert({**given, **derived}, kind)
    except msgspec.ValidationError as error:
        raise wrong(str(error)) from None


def check(settings: DecoderSettings, shard: RankInfo, inner: int, key_heads: int = 0) -> None:
    """`inner`: the least inner size of any MLP; `key_heads`: of delta nets, which are shared out evenly.

    Raises:
        ModelError: settings that are not supported, or a model that can't be split over so many ranks.
    """
    heads, kv_heads = settings.num_attention_heads, settings.kv_heads
    if settings.hidden_act != "silu":
        raise wrong(f"hidden_act is {settings.hidden_act}; silu is supported")
    if heads % kv_heads:
        raise wrong(f"{heads} attention heads can't share {kv_heads} kv heads")
    if settings.rotated < 1 or settings.rotated % 2:
        raise wrong(f"heads of {settings.width} numbers can't be rotated: an even number is needed")
    sizes = [size for size in tensor_parallel_sizes(heads, kv_heads) if size <= inner and key_heads % size == 0]
    if shard.size not in sizes:
        linear = f" and {key_heads} linear key heads" if key_heads else ""
        mlp = f" and an MLP of {inner}" if inner < heads else ""
        raise ModelError(
            f"a model with {heads} attention heads and {kv_heads} kv heads{linear}{mlp} can't be split over "
            f"{shard.size} ranks; it can over {', '.join(map(str, sizes))}"
        )


def check_layer_types(settings: DecoderSettings) -> None:
    """
    Raises:
        ModelError: a layer is of a kind that attention is not.
    """
    if unknown := set(settings.layer_types or ()) - _KINDS:
        raise wrong(f"there are layers of the kind {min(unknown)}; supported are {', '.join(sorted(_KINDS))}")


def wrong(message: str) -> ModelError:
    """What is wrong with a setting, so that no attempt will succeed."""
    return ModelError(f"config.json: {message}", kind=LoadFailure.PERMANENT)
