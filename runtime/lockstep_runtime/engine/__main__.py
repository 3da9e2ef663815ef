"""The engine process of the leader pod: `python -m lockstep_runtime.engine`, started by its supervisor."""

from __future__ import annotations

from lockstep_runtime.engine.main import main

if __name__ == "__main__":
    main()
