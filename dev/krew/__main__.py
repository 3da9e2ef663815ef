"""The plugin in krew's form, in build/krew: an archive, and the manifest that names it. `python3 -m dev.krew URI`,
where the archive will be found; an index of your own serves both."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).resolve().parents[2]
LAUNCHER: Final = Path(__file__).with_name("kubectl-lockstep")
ARCHIVE: Final = "kubectl-lockstep.tar.gz"
DESCRIPTION: Final = """\
What is wrong with a model that Lockstep serves and what to do about it, which groups a change would restart, and game
days, which break a copy of a model and prove its answers.
"""
SYSTEMS: Final = ("linux", "darwin")


def build(folder: Path, uri: str) -> Path:
    """The manifest, beside the archive."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        hatchling = Path(sys.executable).with_name("hatchling")
        subprocess.run([hatchling, "build", "-t", "wheel", "-d", scratch], cwd=ROOT, check=True, stdout=sys.stderr)
        (wheel,) = Path(scratch).glob("*.whl")
        version = wheel.name.split("-")[1]
        with tarfile.open(folder / ARCHIVE, "w:gz") as archive:
            for file in (wheel, LAUNCHER, ROOT / "LICENSE"):
                archive.add(file, file.name)
    digest = hashlib.sha256((folder / ARCHIVE).read_bytes()).hexdigest()
    path = folder / "lockstep.yaml"
    path.write_text(yaml.safe_dump(manifest(version, uri, digest), sort_keys=False))
    return path


def manifest(version: str, uri: str, digest: str) -> dict[str, Any]:
    platforms = [
        {"selector": {"matchLabels": {"os": name}}, "uri": uri, "sha256": digest, "bin": LAUNCHER.name}
        for name in SYSTEMS
    ]
    return {
        "apiVersion": "krew.googlecontainertools.github.com/v1alpha2",
        "kind": "Plugin",
        "metadata": {"name": "lockstep"},
        "spec": {
            "version": f"v{version}",
            "shortDescription": "Ask and test TensorParallelModels",
            "description": DESCRIPTION,
            "caveats": "It needs Python 3.11 or later, and uv or pipx.\n",
            "platforms": platforms,
        },
    }


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python3 -m dev.krew URI-OF-THE-ARCHIVE", file=sys.stderr)
        return 2
    print(build(ROOT / "build" / "krew", sys.argv[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
