"""Names a collective after the module whose weights feed it."""

from __future__ import annotations

from lockstep_runtime.weights.sharding import TensorSlice


def collective_name(tensor_slice: TensorSlice) -> str:
    """`model.layers.12.mlp.down_proj.weight` is the place `layers.12.mlp.down_proj`."""
    return tensor_slice.tensor.removeprefix("model.").removesuffix(".weight")
