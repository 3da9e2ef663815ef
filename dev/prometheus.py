"""Prometheus and its checker of rules, in .dev/bin: the machine's, or else out of Debian's package, which isn't
installed: it would start a server. `python3 -m dev.prometheus`."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

BIN: Final = Path(__file__).resolve().parents[1] / ".dev" / "bin"
PACKAGE: Final = "prometheus"
PROGRAMS: Final = ("prometheus", "promtool")
FOLDER: Final = "usr/bin"  # within the package
SECONDS: Final = 300


def main() -> int:
    BIN.mkdir(parents=True, exist_ok=True)
    with (BIN / "prometheus.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return 0 if all((BIN / name).exists() for name in PROGRAMS) else _get()


def _get() -> int:
    if all(map(shutil.which, PROGRAMS)):
        for name in PROGRAMS:
            (BIN / name).unlink(missing_ok=True)
            (BIN / name).symlink_to(str(shutil.which(name)))
        return 0
    if shutil.which("apt-get") is None:
        print(f"{' and '.join(PROGRAMS)} are missing, and there is no apt-get: install Prometheus", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(dir=BIN) as folder:
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
    for name in PROGRAMS:
        (folder / "content" / FOLDER / name).replace(BIN / name)
    return 0


def _run(*command: str, folder: Path, quiet: bool = False) -> bool:
    errors = subprocess.DEVNULL if quiet else sys.stderr
    return subprocess.run(command, cwd=folder, stderr=errors, timeout=SECONDS, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
