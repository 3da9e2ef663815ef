"""Gumbel noise that is a function of (seed, position, token), the same for any batch and on any device.

Whole numbers are hashed, which no device rounds; the two logarithms differ by a unit in the last place at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

MASK: Final = (1 << 64) - 1
GOLDEN_64: Final = 0x9E3779B97F4A7C15
GOLDEN_32: Final = 0x9E3779B9
FACTORS: Final = (0x21F0AAAD, 0x735A2D97)  # https://github.com/skeeto/hash-prospector
BITS: Final = 31
BELOW_ONE: Final = 1 - 2**-23  # so that the largest number doesn't round to one, whose noise is minus infinity


def keys(streams: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Of (seed, position) each: [n, 2], 64 bits in two int32.

    SplitMix64's finalizer, twice (https://doi.org/10.1145/2660193.2660195): once to spread the seed, so that streams of
    neighbouring seeds have nothing in common, once for the position in its stream.
    """
    mixed = [_mix((_mix(seed & MASK) + (position + 1) * GOLDEN_64) & MASK) for seed, position in streams]
    return torch.tensor([[_signed(key), _signed(key >> 32)] for key in mixed], dtype=torch.int32, device=device)


def gumbel_noise(keys: Tensor, tokens: Tensor) -> Tensor:
    """keys: [n, 2], tokens: [n or 1, m] -> [n, m], float32, from -2.8 to 22.2.

    From numbers in (0, 1) that are spaced evenly by 2^-31: the largest noise, which decides, comes from the smallest of
    them, where float32 is finest.
    """
    hashed = _hash(keys, tokens.to(torch.int32))
    negated = hashed.float().add_(0.5).mul_(-BELOW_ONE * 2.0**-BITS)
    return negated.log1p_().neg_().log_().neg_()


def _hash(keys: Tensor, tokens: Tensor) -> Tensor:
    """A bijective mixer of 32 bits, with the second key between its two rounds; gives its lowest 31 bits."""
    state = tokens * _signed(GOLDEN_32) + keys[:, :1]  # int32 wraps around, on every device
    _fold(state, 16).mul_(_signed(FACTORS[0]))
    _fold(state, 15).bitwise_xor_(keys[:, 1:]).mul_(_signed(FACTORS[1]))
    return _fold(state, 15).bitwise_and_((1 << BITS) - 1)


def _fold(state: Tensor, bits: int) -> Tensor:
    """In place: state ^ (state >> bits), without sign."""
    return state.bitwise_xor_((state >> bits).bitwise_and_((1 << (32 - bits)) - 1))


def _mix(state: int) -> int:
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def _signed(number: int) -> int:
    """The lowest 32 bits, as an int32."""
    return ((number & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000
