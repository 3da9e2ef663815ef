"""Names a collective after the module whose weights feed it."""

from __future__ import annotations


def collective_name(tensor: str) -> str:
    """`model.layers.12.mlp.down_proj.weight` is the place `layers.12.mlp.down_proj`."""
    return tensor.removeprefix("model.").removesuffix(".weight")
