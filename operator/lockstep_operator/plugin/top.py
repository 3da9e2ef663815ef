"""`kubectl lockstep top`: what each group does just now, by its own words (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from lockstep_operator.plugin.asking import Probe
from lockstep_operator.plugin.status import table
from lockstep_runtime.protocol.status import RankState

HEAD: Final = (
    "MODEL", "GROUP", "STATE", "RANKS", "RUNNING", "WAITING", "TOKENS/S", "KV", "STEP P50", "STEP P99", "FAULTS",
)  # fmt: skip


def row(model: str, group: int, found: Probe | str) -> tuple[str, ...]:
    """`found` is why there is nothing, else what the group says."""
    if isinstance(found, str):
        return (model, str(group), found, *[""] * (len(HEAD) - 3))
    cells = cells_of(found)
    latency = found.status.step_latency
    return (
        model,
        str(group),
        cells["state"],
        f"{cells['readyRanks']}/{cells['ranks']}",
        str(cells["running"]),
        str(cells["waiting"]),
        f"{cells['tokensPerSecond']:.1f}",
        f"{cells['kvUsage']:.0%}",
        *("" if value is None else f"{value:.1f}ms" for value in (latency.p50_ms, latency.p99_ms)),
        str(cells["recoveries"]),
    )


def cells_of(found: Probe) -> dict[str, Any]:
    """For programs."""
    status, metrics = found.status, found.metrics
    return {
        "state": str(status.state),
        "readyRanks": sum(rank.state is RankState.READY for rank in status.ranks),
        "ranks": len(status.ranks),
        "running": int(metrics.get("lockstep_num_requests_running", 0)),
        "waiting": int(metrics.get("lockstep_num_requests_waiting", 0)),
        "tokensPerSecond": round(found.tokens_per_second, 1),
        "kvUsage": round(metrics.get("lockstep_kv_cache_usage_ratio", 0.0), 4),
        "stepP50Ms": status.step_latency.p50_ms,
        "stepP99Ms": status.step_latency.p99_ms,
        "recoveries": status.recoveries,
        "slowestRank": slowest(found),
    }


def document(found: Probe | str) -> dict[str, Any]:
    return {"error": found} if isinstance(found, str) else cells_of(found)


def slowest(found: Probe) -> int | None:
    """The rank whose steps take longest at the median; None before there are any."""
    timed = [(rank.step_latency.p50_ms, -rank.rank) for rank in found.status.ranks if rank.step_latency.p50_ms]
    return -max(timed)[1] if timed else None


def text(found: Mapping[tuple[str, int], Probe | str]) -> str:
    return table([HEAD, *(row(model, group, one) for (model, group), one in found.items())])
