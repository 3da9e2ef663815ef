"""The log's trail of a repair: a line for each phase, with the fault's number, the epoch and the rank as fields."""

from __future__ import annotations

import enum
import logging

from lockstep_runtime import log


class TrailPhase(enum.StrEnum):
    """What a line of the trail begins with. The rungs' lines say which was chosen, and why."""

    WATCHDOG = "watchdog"  # the fault, the suspect and why
    DROP = "drop"
    ABORT = "abort"
    RESPAWN = "respawn"
    REBUILD = "rebuild"
    VERIFY = "verify"
    RESUMED = "resumed"
    POISONED = "poisoned"


def write(
    logger: logging.Logger,
    level: int,
    phase: TrailPhase,
    message: str,
    *,
    fault: int,
    epoch: int | None = None,
    rank: int | None = None,
    rung: str | None = None,
    seconds: float | None = None,
    kept: bool | None = None,
) -> None:
    """One line: `rebuild: fault 3 epoch 8: … (0.021 s)`.

    Args:
        rank: the suspect.
        rung: the one that was chosen.
        kept: whether the KV caches are as they were.
    """
    at = f"fault {fault}" if epoch is None else f"fault {fault} epoch {epoch}"
    took = "" if seconds is None else f" ({seconds:.3f} s)"
    extra = log.fields(fault=fault, epoch=epoch, rank=rank, rung=rung, phase=phase, seconds=seconds, kept=kept)
    logger.log(level, "%s: %s: %s%s", phase, at, message, took, extra=extra)
