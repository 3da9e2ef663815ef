"""Who may be a member of a group. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from lockstep_runtime.config import ServeConfig
from lockstep_runtime.protocol import bus
from lockstep_runtime.recovery.rank_handle import RankHandle


def refusal(hello: bus.Hello, config: ServeConfig, handles: Sequence[RankHandle]) -> str:
    """Why this peer does not belong here; empty if it does."""
    if hello.group != config.group:
        return f"this is group {config.group}, not {hello.group}"
    if not 0 <= hello.pod_index < config.pods:
        return f"there is no pod {hello.pod_index} in a group of {config.pods}"
    if hello.role is bus.Role.SUPERVISOR:
        return ""
    if not 0 <= hello.rank < len(handles) or handles[hello.rank].pod_index != hello.pod_index:
        return f"rank {hello.rank} does not belong to pod {hello.pod_index}"
    if hello.incarnation in handles[hello.rank].past_incarnations:
        return f"another process has taken the place of this rank {hello.rank}"
    return ""
