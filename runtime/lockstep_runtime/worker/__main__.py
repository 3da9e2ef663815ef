"""One rank's process: `python -m lockstep_runtime.worker --rank R`, started by a supervisor with LOCKSTEP_CONFIG."""

from __future__ import annotations

import argparse

from lockstep_runtime.worker.main import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="lockstep-worker")
    parser.add_argument("--rank", type=int, required=True)
    main(parser.parse_args().rank)
