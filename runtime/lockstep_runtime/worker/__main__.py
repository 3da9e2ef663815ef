"""One rank's process: `python -m lockstep_runtime.worker --rank R`, started by a supervisor with LOCKSTEP_CONFIG.

With `--spare` it becomes a rank only when a line on its standard input says which.
"""

from __future__ import annotations

import argparse

from lockstep_runtime.worker.main import main, main_of_spare

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="lockstep-worker")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--rank", type=int)
    which.add_argument("--spare", action="store_true")
    options = parser.parse_args()
    if options.spare:
        main_of_spare()
    else:
        main(options.rank)
