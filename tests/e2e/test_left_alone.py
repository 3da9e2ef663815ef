"""An operator has nothing to write about a model that nobody changes, asks or disturbs."""

from __future__ import annotations

import time
from typing import Final

from tests.support.cluster_rest import Rest

QUIET_SECONDS: Final = 60.0


def test_nothing_is_written_when_nothing_changes(at_rest: Rest) -> None:
    """The fixture began with the session's first test of the served model. Those that ask it for tokens come later.

    Other models came and went meanwhile, and operators with them: a new one that finds all in order writes nothing.
    """
    time.sleep(max(0.0, at_rest.since + QUIET_SECONDS - time.monotonic()))

    assert at_rest.changes() == {}
