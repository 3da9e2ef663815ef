"""The seed of a test that leaves something to chance: printed, so that a failed run can be repeated."""

from __future__ import annotations

import os
import secrets
from typing import Final

VARIABLE: Final = "LOCKSTEP_TEST_SEED"  # repeats an earlier run


def printed_seed() -> int:
    seed = int(os.environ.get(VARIABLE) or secrets.randbelow(2**31))
    print(f"{VARIABLE}={seed}")
    return seed
