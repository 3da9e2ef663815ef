"""Of all tests: one that is told to end ends what it has started."""

from __future__ import annotations

import signal

signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: fixtures are torn down
