"""Go programs that tests and benchmarks need beside the cluster's own, in .dev/bin: `python3 -m dev.go_tool kwok`.

dev/tools/NAME is a module whose go.mod names the one program, as its tool, and go.sum all that it is built from.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from dev.cluster import toolchain
from dev.cluster.layout import BIN
from dev.cluster.progress import Failure, say

TOOLS: Final = Path(__file__).with_name("tools")
TOOL: Final = "tool"  # what go calls all tools of a module


def ensure(name: str) -> None:
    """Build it when it is missing or its module changed. Raises Failure."""
    sources, stamp = TOOLS / name, BIN / f"{name}.sha256"
    if not (sources / "go.mod").exists():
        raise Failure(f"there is no {name}: dev/tools has {', '.join(sorted(one.name for one in TOOLS.iterdir()))}")
    wanted = toolchain.digest(sources)
    if stamp.exists() and stamp.read_text() == wanted:
        return
    BIN.mkdir(parents=True, exist_ok=True)
    say(f"building {name} from source (a minute or two, once)")
    toolchain.build(sources, TOOL, BIN / name)
    stamp.write_text(wanted)
    say(f"built .dev/bin/{name}")


def main() -> int:
    try:
        for name in sys.argv[1:]:
            ensure(name)
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
