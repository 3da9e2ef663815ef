"""Prometheus' own checker of rules, in .dev/bin: the machine's, or else out of Debian's package, which isn't installed:
it would start a server. `python3 -m dev.promtool`."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

TARGET: Final = Path(__file__).resolve().parents[1] / ".dev" / "bin" / "promtool"
PACKAGE: Final = "prometheus"
PROGRAM: Final = "usr/bin/promtool"  # within the package
SECONDS: Final = 300


def main() -> int:
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    if found := shutil.which("promtool"):
        TARGET.unlink(missing_ok=True)
        TARGET.symlink_to(found)
        return 0
    if shutil.which("apt-get") is None:
        print("promtool is missing, and there is no apt-get: install Prometheus' promtool", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(dir=TARGET.parent) as folder:
        return _unpacked(Path(folder))


def _unpacked(folder: Path) -> int:
    if not _run("apt-get", "-qq", "download", PACKAGE, folder=folder, quiet=True):
        _run("apt-get", "-qq", "update", folder=folder)
        if not _run("apt-get", "-qq", "download", PACKAGE, folder=folder):
            print(f"apt-get could not download {PACKAGE}; its own words are above", file=sys.stderr)
            return 1
    (archive,) = folder.glob("*.deb")
    if not _run("dpkg", "-x", archive.name, "content", folder=folder):
        return 1
    (folder / "content" / PROGRAM).replace(TARGET)
    return 0


def _run(*command: str, folder: Path, quiet: bool = False) -> bool:
    errors = subprocess.DEVNULL if quiet else sys.stderr
    return subprocess.run(command, cwd=folder, stderr=errors, timeout=SECONDS, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
