"""What every bench prints and writes: a table, and build/bench/<name>.json."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

OUTPUT = Path(__file__).parent.parent / "build" / "bench"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure; `peer` is what it is set beside, and `ratio` ours over theirs."""

    case: str
    metric: str
    value: float
    unit: str
    peer: str = ""
    peer_value: float | None = None

    @property
    def ratio(self) -> float | None:
        return self.value / self.peer_value if self.peer_value else None


def report(name: str, rows: list[Row]) -> Path:
    """Print the rows as a table and write them as JSON; returns the file's path."""
    lines = [("case", "metric", "value", "unit", "peer", "peer value", "ratio")]
    for row in rows:
        lines.append(
            (row.case, row.metric, _number(row.value), row.unit, row.peer, _number(row.peer_value), _number(row.ratio))
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    OUTPUT.mkdir(parents=True, exist_ok=True)
    path = OUTPUT / f"{name}.json"
    document = {"name": name, "machine": machine(), "rows": [asdict(row) | {"ratio": row.ratio} for row in rows]}
    path.write_bytes(msgspec.json.format(msgspec.json.encode(document)) + b"\n")
    return path


def machine() -> str:
    """The processor's name and how many cores may be used."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
