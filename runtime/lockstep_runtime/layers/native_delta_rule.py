"""One token of each sequence by the gated delta rule, on a CPU: by one call in C, from slot to slot of the cache."""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from lockstep_runtime.layers.delta_rule import Inputs, advance_, of_unit_length
from lockstep_runtime.layers.native.library import Argument, function, load
from lockstep_runtime.layers.trial import DIFFERS, failure_of

logger = logging.getLogger(__name__)

Step = Callable[[Inputs, Tensor, Tensor, Tensor], Tensor]
"""Inputs of one token a sequence, states [slots, value_heads, value_dim, key_dim], reads and writes [sequences], which
share no slot -> answers [sequences, value_heads, value_dim], float32; what is read stays as it is."""

_KERNEL: Final[tuple[Argument, ...]] = (*[ctypes.c_void_p] * 9, *[ctypes.c_int64] * 5)
TRIED_SEQUENCES, TRIED_KEY_HEADS, TRIED_HEADS, TRIED_KEYS, TRIED_VALUES = 3, 2, 4, 40, 24


@functools.cache
def native_step() -> Step | None:
    """None where it isn't compiled for this CPU, or gives other numbers than torch's operations."""
    found: list[Step] = []
    if failure := failure_of(lambda: _failure(found)):
        logger.warning("delta nets are computed by torch, which copies their states: %s", failure)
        return None
    return found[0]


def step_by(library: ctypes.CDLL) -> Step:
    kernel = function(library, "advance", *_KERNEL)

    def step(inputs: Inputs, states: Tensor, reads: Tensor, writes: Tensor) -> Tensor:
        sequences, key_heads, width = inputs.keys.shape
        heads, rows = inputs.values.shape[1:]
        answers = torch.empty(sequences, heads, rows)
        given = (  # named, so that the copies among them live until the kernel has read them
            of_unit_length(inputs.queries) * width**-0.5,
            of_unit_length(inputs.keys),
            inputs.values.float().contiguous(),
            inputs.decay.exp().contiguous(),
            inputs.beta.contiguous(),
            states,
            reads.contiguous(),
            writes.contiguous(),
            answers,
        )
        kernel(
            *(one.data_ptr() for one in given),
            *(sequences, key_heads, heads, width, rows),
        )
        return answers

    return step


def _failure(found: list[Step]) -> str | None:
    step = step_by(load(torch.float32))
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    keys, values = (TRIED_SEQUENCES, TRIED_KEY_HEADS, TRIED_KEYS), (TRIED_SEQUENCES, TRIED_HEADS)
    inputs = Inputs(
        queries=numbers(*keys), keys=numbers(*keys), values=numbers(*values, TRIED_VALUES),
        decay=-numbers(*values).abs(), beta=numbers(*values).sigmoid(),
    )  # fmt: skip
    states = numbers(2 * TRIED_SEQUENCES, TRIED_HEADS, TRIED_VALUES, TRIED_KEYS)
    writes, reads = torch.arange(2 * TRIED_SEQUENCES).chunk(2)
    expected = states[reads]
    answers = step(inputs, states, reads, writes)
    same = torch.allclose(answers, advance_(inputs, expected, None), rtol=1e-5, atol=1e-5)
    if not same or not torch.allclose(states[writes], expected, rtol=1e-5, atol=1e-5):
        return DIFFERS
    found.append(step)
    return None
