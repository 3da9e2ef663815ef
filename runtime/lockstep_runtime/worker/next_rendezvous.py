"""The rendezvous of the epoch to come, opened while the group serves."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Final

from lockstep_runtime.distributed.communicator import Rendezvous
from lockstep_runtime.distributed.errors import CommunicatorError

DELAY_SECONDS: Final = 1.0  # after a join, so that it takes nothing from the proof and the first steps


class NextRendezvous:
    """Rank 0's. The ranks' exchange takes as long to be laid out as the rest of a rebuild."""

    def __init__(self, opened: Callable[[], Rendezvous], delay: float = DELAY_SECONDS) -> None:
        """`opened` opens one, or raises CommunicatorError."""
        self._opened, self._delay = opened, delay
        self._found: Rendezvous | None = None
        self._timer: threading.Timer | None = None

    def prepare(self) -> None:
        """Open one, before long. It must have been taken before the next is prepared."""
        self._timer = threading.Timer(self._delay, self._open)
        self._timer.daemon = True
        self._timer.start()

    def take(self) -> Rendezvous | None:
        """What was opened; one that is being opened is waited for, so that nothing else opens one meanwhile."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
            timer.join()
        found, self._found = self._found, None
        return found

    def close(self) -> None:
        found = self.take()
        if found is not None:
            found.close()

    def _open(self) -> None:
        with contextlib.suppress(CommunicatorError):  # whoever needs one is told why there is none
            self._found = self._opened()
