"""What an engine counts that has done nothing yet: for what renders it."""

from __future__ import annotations

from typing import Final

from lockstep_runtime.engine.client import EngineStats

IDLE: Final = EngineStats(
    requests_running=0,
    requests_waiting=0,
    kv_blocks_total=1,
    kv_blocks_used=0,
    preemptions_total=0,
    prefix_cache_queries_total=0,
    prefix_cache_hits_total=0,
    steps_total=0,
    recoveries_total=0,
    epoch=1,
    last_step_at=1.0,
)
