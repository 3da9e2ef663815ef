"""What the user sees: one line per step, with the seconds since the command began. Errors that need no traceback."""

import sys
import time

_STARTED = time.monotonic()


class Failure(Exception):  # noqa: N818 (it is shown to people, who need no "Error" in it)
    """Something that the user can mend; its text says what and how. Shown without a traceback."""


def say(text: str) -> None:
    print(f"{time.monotonic() - _STARTED:7.1f} s  {text}", file=sys.stderr, flush=True)
