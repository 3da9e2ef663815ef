"""What a collective's place is called: the module whose weights feed it, as a person would say it."""

from __future__ import annotations

from lockstep_runtime.weights.sharding import Cut


def place_of(cut: Cut) -> str:
    """`model.layers.12.mlp.down_proj.weight` is the place `layers.12.mlp.down_proj`."""
    return cut.tensor.removeprefix("model.").removesuffix(".weight")
