"""The browser that the live page is tested in, as .dev/bin/browser: the machine's Chromium, or else Debian's.
`python3 -m dev.browser`."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

TARGET: Final = Path(__file__).resolve().parents[1] / ".dev" / "bin" / "browser"
PROGRAMS: Final = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
PACKAGE: Final = "chromium-headless-shell"
SECONDS: Final = 600


def main() -> int:
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    with (TARGET.parent / "browser.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # make test has two phases that need it
        found = _installed() or _install()
        if found is None:
            print(f"no Chromium: install {PACKAGE}, or another of {', '.join(PROGRAMS)}", file=sys.stderr)
            return 1
        TARGET.unlink(missing_ok=True)
        TARGET.symlink_to(found)
    return 0


def _installed() -> str | None:
    return next((path for program in PROGRAMS if (path := shutil.which(program))), None)


def _install() -> str | None:
    if shutil.which("apt-get") is None:
        return None
    if not _apt("install", "--no-install-recommends", PACKAGE):
        _apt("update")
        _apt("install", "--no-install-recommends", PACKAGE)
    return _installed()


def _apt(*words: str) -> bool:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "-y", "-qq", "-o", "DPkg::Lock::Timeout=300", *words]
    return subprocess.run(command, env=environment, stdout=sys.stderr, timeout=SECONDS, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
