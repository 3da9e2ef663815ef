"""The stages of a group's life, their deadlines, and what follows.

    PAUSING → GATHERING → ASSEMBLING → WAITING → SERVING
       ↑______________________ a fault ____________|
                                  ↓ no rung of the ladder is left
                              POISONED

Every stage ends by what it waits for or by a deadline. A missed deadline is a fault, which leads to the ladder; when
its budgets are spent the group is POISONED and retries with growing delays. What the stages wait for, and what follows:

| stage | until | its deadline, and what follows it |
|---|---|---|
| PAUSING | | `RETRY_SECONDS`: GATHERING |
| GATHERING | every rank is loaded and idle | each rank's own: it is killed, which is charged; then POISONED |
| ASSEMBLING | the group is joined and proved | each call's: a fault; `Backend.attempts` of them: POISONED |
| WAITING | the model's configuration | `MODEL_SECONDS`: still waits, and the group says `Failed` |
| SERVING | a fault | that of each step |
| POISONED | a new pod | `POISONED_SECONDS`: PAUSING, with new processes; by strategy RecyclePods the operator's |
"""

from __future__ import annotations

import enum
from typing import Final


class Stage(enum.StrEnum):
    """Where the group's life stands."""

    PAUSING = "pausing"  # between two attempts
    GATHERING = "gathering"  # ranks leave their collectives, come back and load
    ASSEMBLING = "assembling"  # they join, lay out caches and are proved: see `Assembly`
    WAITING = "waiting"  # for the model's configuration
    SERVING = "serving"
    POISONED = "poisoned"


APART: Final = (Stage.PAUSING, Stage.GATHERING, Stage.POISONED)  # ranks come and go without being missed
