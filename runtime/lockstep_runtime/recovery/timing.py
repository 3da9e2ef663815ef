"""How long a group waits for its ranks in each state of its life: the bounds of recovery. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from lockstep_runtime.config import ServeConfig
from lockstep_runtime.recovery.watchdog import Deadline

RETRY_SECONDS: Final = (0.0, 0.2, 0.5, 1.0, 2.0, 5.0)  # between attempts to form the group
POISONED_SECONDS: Final = (30.0, 300.0)  # before a poisoned group tries again by itself: at first, and at most
LONGEST_ABORT_SECONDS: Final = 5.0
RECONNECT_SECONDS: Final = 5.0  # a process whose connection is lost and that does not come back is killed
DEATH_SECONDS: Final = 5.0  # a process that was killed and is still connected is killed again
LOADING_SECONDS: Final = 120.0  # without a byte more, a download's included, before the group has served
# The same once it has: from and to; in between, as long as the whole loading took before, and as long again.
RELOADING_SECONDS: Final = 15.0, 60.0
# Then the group gives up: a rank was out of reach for so long, or no process of it came further than those before it.
ABSENT_SECONDS: Final = 60.0
STUCK_SECONDS: Final = 60.0, 150.0  # from and to; in between, as long as two and a half of its processes may take
FIRST_SECONDS: Final = 300.0  # both, before the group has served: pods are made and models downloaded
ACCEPTING_SECONDS: Final = 120.0  # that requests are still taken while the group recovers
MODEL_SECONDS: Final = 60.0  # for the model's configuration, which the leader reads by itself
ROOM_SECONDS: Final = 10.0  # for memory that processes which were killed had on a device
ROOM_LOOK_SECONDS: Final = 1.0

RENDEZVOUS: Final = Deadline(15.0, 15.0, extends=False)
ALLOCATE: Final = Deadline(120.0, 120.0, extends=False)
SCRUB: Final = Deadline(120.0, 120.0, extends=False)


@dataclass(frozen=True, slots=True)
class Backend:
    """What depends on how the ranks' collectives are made.

    `join`: extended as long as no rank holds up the others. `abort`: a rank that has not left its collective by then is
    killed, and one that was still joining after `abort_joining`. `attempts`: how long ranks that have all been there
    may fail to join, one time after the other.
    """

    join: Deadline
    abort: float
    abort_joining: float
    attempts: float


# Ranks on CPUs leave a join at once, and one that hangs is seen in its record.
HOST: Final = Backend(join=Deadline(2.5, 60.0, extends=True), abort=1.5, abort_joining=15.0, attempts=150.0)
# NCCL's init takes seconds to a minute on large or cold machines, knows no time-out and can't be left; its abort waits
# for streams and for the threads of its proxies.
NCCL: Final = Backend(join=Deadline(15.0, 150.0, extends=True), abort=10.0, abort_joining=150.0, attempts=600.0)


@dataclass(frozen=True, slots=True)
class Timing:
    """Of one group. `step_timeout`: the user's, in seconds."""

    backend: Backend
    step_timeout: float | None

    def loading(self, longest_load: float, *, has_served: bool) -> float:
        """How long a rank may load without getting further. `longest_load`: seconds that a whole one took."""
        shortest, longest = RELOADING_SECONDS if has_served else (LOADING_SECONDS, LOADING_SECONDS)
        return self.step_timeout or min(max(2 * longest_load, shortest), longest)

    def stuck(self, longest_load: float, *, has_served: bool) -> float:
        """How long all of a rank's processes together may get no further."""
        if not has_served:
            return FIRST_SECONDS
        shortest, longest = STUCK_SECONDS
        return min(max(2.5 * self.loading(longest_load, has_served=True), shortest), longest)

    def absent(self, *, has_served: bool) -> float:
        """How long a rank may be out of reach."""
        return ABSENT_SECONDS if has_served else FIRST_SECONDS

    def poisoned(self, times: int) -> float:
        """How long the group stays poisoned before it tries again; `times` in a row, from 1."""
        first, most = POISONED_SECONDS
        return float(min(most, first * 2 ** min(times - 1, 16)))

    def retry(self, failures: int) -> float:
        return RETRY_SECONDS[min(failures, len(RETRY_SECONDS) - 1)]


def timing_of(config: ServeConfig) -> Timing:
    nccl = config.backend == "nccl" or (config.backend == "auto" and config.device == "cuda")
    return Timing(NCCL if nccl else HOST, config.watchdog.step_timeout)
