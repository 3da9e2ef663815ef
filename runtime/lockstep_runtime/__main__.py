"""`python -m lockstep_runtime` is `lockstep`."""

from __future__ import annotations

from lockstep_runtime.cli import main

main()
