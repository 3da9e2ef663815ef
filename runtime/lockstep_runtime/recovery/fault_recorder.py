"""Records the coordinator's actions: in the log of faults and as lines of the log trail."""

from __future__ import annotations

import logging
import time

from lockstep_runtime import log
from lockstep_runtime.protocol.status import Fault
from lockstep_runtime.recovery import log_trail
from lockstep_runtime.recovery.actions import (
    Action,
    AttributeNaN,
    Log,
    NameCulprit,
    PhaseOver,
    ReportDeparture,
    ReportFault,
    Resume,
)
from lockstep_runtime.recovery.diagnosis import Evidence
from lockstep_runtime.recovery.fault_log import FaultLog
from lockstep_runtime.recovery.log_trail import TrailPhase
from lockstep_runtime.recovery.policy import Rung

logger = logging.getLogger(__name__)


class FaultRecorder:
    """Writes to `faults` and to the log."""

    def __init__(self, faults: FaultLog) -> None:
        self._faults = faults

    def record(self, action: Action, epoch: int) -> None:
        """What an action adds to the record; of other actions nothing."""
        match action:
            case NameCulprit():
                self._faults.set_cause(action.rank, action.message, Rung.RESPAWN)
            case AttributeNaN():
                message = f"it stood in the KV cache of rank {action.rank}"
                self._faults.attribute(Fault.NON_FINITE, action.rank, message)
            case PhaseOver():
                self._faults.phase(action.phase, action.seconds)
                self._log_phase(action.phase, epoch, action.seconds, action.message)
            case ReportDeparture():
                message = f"{action.message}; the group waits for the next pod"
                logger.info("%s", message, extra=log.fields(epoch=action.epoch))
            case Log() if action.phase:
                log_trail.write(
                    logger, logging.WARNING, action.phase, action.message,
                    fault=self._faults.open_id, epoch=epoch, rank=action.rank,
                )  # fmt: skip
            case Log():
                level = logging.INFO if action.quiet else logging.WARNING
                logger.log(level, "%s", action.message, extra=log.fields(rank=action.rank))
            case _:
                pass

    def report(self, action: ReportFault) -> None:
        """A fault and the rung that it gets."""
        cause, rung, epoch = action.cause, action.decision.rung or "", action.epoch
        if action.recorded:
            self._faults.begin(cause, rung, at=time.time(), epoch=epoch, detect=cause.waited)
        number = self._faults.open_id
        log_trail.write(
            logger, logging.WARNING, TrailPhase.WATCHDOG, f"{cause.fault}: {cause.message}",
            fault=number, epoch=epoch, rank=cause.rank,
        )  # fmt: skip
        chosen = TrailPhase(rung.lower() or "poisoned")
        log_trail.write(logger, logging.WARNING, chosen, action.decision.reason, fault=number, rung=rung or None)

    def drop(self, cause: Evidence, epoch: int) -> None:
        """A request was given up, and nothing else happened."""
        record = self._faults.drop(cause, at=time.time(), epoch=epoch)
        log_trail.write(
            logger, logging.WARNING, TrailPhase.DROP, record.message,
            fault=record.id, epoch=record.epoch, rank=record.rank, rung=record.rung,
        )  # fmt: skip

    def resumed(self, resumed: Resume, requests: int, seconds: float) -> None:
        """The group serves again; so many requests continue."""
        message = f"{requests} {'request goes' if requests == 1 else 'requests go'} on in epoch {resumed.epoch}"
        message += ", with the KV caches as they were" if resumed.kept else ", computed again from the tokens"
        self._log_phase(TrailPhase.RESUMED, resumed.epoch, seconds, message, kept=resumed.kept)

    def _log_phase(
        self, phase: TrailPhase, epoch: int, seconds: float, message: str, *, kept: bool | None = None
    ) -> None:
        """One line a phase; none while the group is first started."""
        if fault := self._faults.open_id:
            log_trail.write(logger, logging.INFO, phase, message, fault=fault, epoch=epoch, seconds=seconds, kept=kept)
