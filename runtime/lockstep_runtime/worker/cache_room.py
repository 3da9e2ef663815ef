"""How large a KV cache a rank can offer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch

from lockstep_runtime.config import ServeConfig
from lockstep_runtime.layers.cache import BLOCK_SIZE, CacheMemory, CacheShape, CacheSize
from lockstep_runtime.protocol.step import PROBE_STATE_SLOTS
from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.worker.device import sharers
from lockstep_runtime.worker.memory import blocks_as_before, cache_budget

STATES_SHARE: Final = 0.5  # of a cache, at most: the rest is for keys and values
KEPT_SHARE: Final = 0.125  # of that rest, at most: for states of what prompts begin with
KEPT_STATES: Final = 2  # for each sequence, at most
FEWEST_STATE_SLOTS: Final = 1 + 2 + PROBE_STATE_SLOTS  # the one of zeros, and one sequence's two


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheRoom:
    """Of one rank. `max_positions`: of the model. `step_bytes`: of its largest step, beside weights and cache."""

    config: ServeConfig
    device: torch.device
    shape: CacheShape
    dtype: torch.dtype
    max_positions: int
    step_bytes: int = 0

    def offer(self, memory: CacheMemory, *, has_cache: bool) -> CacheSize:
        """What fits; never more than all sequences at full length could use, beside the probe.

        Raises:
            ModelError: not even one block and one sequence's state.
        """
        if self.device.type == "cpu" and (held := memory.held(self.shape, self.dtype)):
            return held.size
        budget = self._budget()
        block_bytes = max(1, self.shape.block_bytes(self.dtype))
        state_slots = self.state_slots(budget)
        left = budget - state_slots * self.shape.slot_bytes
        blocks = min(self._useful_blocks(), left // block_bytes)
        if self.device.type == "cuda" and not has_cache:
            total = int(torch.cuda.mem_get_info(self.device)[1])
            blocks = blocks_as_before(blocks, block_bytes, memory.footprint(), total)
        if blocks < 2:  # the probe's, and one for requests
            raise ModelError(
                f"no room for a KV cache: {budget} bytes are left beside the weights, and beside the {self.step_bytes} "
                f"that a step of {self.config.limits.max_batch_tokens} tokens and {self.config.limits.max_sequences} "
                "sequences may take: give it more memory, or lower --max-batch-tokens or --max-sequences"
            )
        return CacheSize(blocks=blocks, state_slots=state_slots)

    def state_slots(self, budget: int) -> int:
        """For recurrent states: two for each sequence, in as much of the budget as is theirs, and some to keep."""
        slot, limits = self.shape.slot_bytes, self.config.limits
        if not slot:
            return 0
        wanted = 1 + 2 * limits.max_sequences + PROBE_STATE_SLOTS
        slots = max(FEWEST_STATE_SLOTS, min(wanted, math.floor(budget * STATES_SHARE / slot)))
        fits = math.floor(max(0, budget - slots * slot) * KEPT_SHARE / slot)
        return slots + (min(KEPT_STATES * limits.max_sequences, fits) if limits.prefix_caching else 0)

    def _budget(self) -> int:
        if self.config.limits.kv_cache_bytes is not None:
            return self.config.limits.kv_cache_bytes
        here = self.config.ranks_per_pod
        if self.device.type == "cuda":
            here = sharers(self.config, torch.cuda.device_count())
        return cache_budget(self.device, here, self.step_bytes)

    def _useful_blocks(self) -> int:
        return self.config.limits.max_sequences * -(-self.longest // BLOCK_SIZE) + 1

    @property
    def longest(self) -> int:
        """Tokens of a sequence."""
        return min(self.config.limits.max_model_len or self.max_positions, self.max_positions)
