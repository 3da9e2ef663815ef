"""Build the images from their Dockerfiles, on a local base, and load them into the cluster."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from dev.cluster import build_store, containers, host
from dev.cluster.layout import BUILD_STORE, DEV, ROOT, SCRATCH
from dev.cluster.progress import Failure, say

BASE: Final = "localhost/lockstep/base:dev"
INSTALLER: Final = "localhost/lockstep/installer:dev"
NAMES: Final = ("operator", "runtime")
# The machine's ways to the package index, which are no business of a Dockerfile.
MOUNTED: Final = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pip.conf")
INDEX_SETTINGS: Final = ("PIP_INDEX_URL", "UV_DEFAULT_INDEX")
_SUITE: Final = "bookworm"
_BASE_PACKAGES: Final = "python3,python3-venv,ca-certificates"


def make(names: tuple[str, ...] = NAMES) -> None:
    """Build and load what changed; the cluster must be up."""
    host.install_packages()
    for name in names:
        if _loaded(name):
            say(f"image lockstep/{name}:dev is up to date")
            continue
        _build(name)
        build_store.load(f"localhost/lockstep/{name}:dev", f"docker.io/lockstep/{name}:dev")
        _stamp(name).parent.mkdir(parents=True, exist_ok=True)
        _stamp(name).write_text(inputs_digest(name))
        say(f"loaded lockstep/{name}:dev")
    _prune()


def inputs_digest(name: str) -> str:
    """A digest of everything that goes into an image: what .dockerignore lets through, and the Dockerfile."""
    digest = hashlib.sha256()
    for path in sorted(inputs(name)):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def inputs(name: str) -> list[Path]:
    single = [f"images/{name}.Dockerfile", f"requirements/{name}.txt", "images/installer.txt"]
    single += ["pyproject.toml", "README.md", "LICENSE", ".dockerignore"]
    trees = [path for tree in ("operator", "runtime") for path in (ROOT / tree).rglob("*")]
    return [ROOT / path for path in single] + [path for path in trees if path.is_file() and path.suffix != ".pyc"]


def _build(name: str) -> None:
    if not _exists(BASE):
        _make_base()
    dockerfile = f"images/{name}.Dockerfile"
    say(f"building lockstep/{name}:dev (its dependencies take minutes when they changed, else seconds)")
    _bud(dockerfile, INSTALLER, "--target", "installer")
    _bud(dockerfile, f"localhost/lockstep/{name}:dev")


def _bud(dockerfile: str, tag: str, *options: str) -> None:
    volumes = [f"--volume={path}:{path}:ro" for path in MOUNTED if Path(path).exists()]
    arguments = [f"--build-arg={name}={os.environ[name]}" for name in INDEX_SETTINGS if name in os.environ]
    arguments.append(f"--build-arg=BASE={BASE}")
    local = ["--layers", "--isolation=chroot", "--network=host", "--pull-never"]
    _buildah("bud", *local, *volumes, *arguments, *options, f"--file={dockerfile}", f"--tag={tag}", ".")


def _make_base() -> None:
    """Debian with its Python, by debootstrap: the place of python:3.11-slim where no image registry is at hand."""
    say("making a Debian base with Python by debootstrap")
    container = _buildah("from", "scratch").strip()
    folder = _buildah("mount", container).strip()
    debootstrap = ["debootstrap", "--variant=minbase", f"--include={_BASE_PACKAGES}", _SUITE, folder]
    if mirror := os.environ.get("DEBIAN_MIRROR"):
        debootstrap.append(mirror)
    log = DEV / "logs" / "debootstrap.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        if subprocess.run(debootstrap, stdout=output, stderr=output).returncode != 0:
            raise Failure(f"debootstrap failed; see {log}")
    for leftovers in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc"):
        subprocess.run(["find", f"{folder}/{leftovers}", "-type", "f", "-delete"], check=True)
    _buildah("umount", container)
    _buildah("commit", "--quiet", "--rm", container, BASE)


def _prune() -> None:
    """Old versions of the images; what the named ones are made of stays as the next build's cache."""
    subprocess.run(_command("rmi", "--prune"), capture_output=True, env=_environment())


def _loaded(name: str) -> bool:
    stamp = _stamp(name)
    listed = containers.ctr("images", "list", "--quiet").split()
    current = stamp.exists() and stamp.read_text() == inputs_digest(name)
    return current and f"docker.io/lockstep/{name}:dev" in listed


def _exists(image: str) -> bool:
    command = _command("inspect", "--type", "image", image)
    return subprocess.run(command, capture_output=True, env=_environment()).returncode == 0


def _stamp(name: str) -> Path:
    return DEV / "images" / f"{name}.sha256"


def _buildah(*arguments: str) -> str:
    """Run buildah; what it says goes to the terminal line by line for a build, and is returned otherwise."""
    showing = arguments[0] == "bud"
    done = subprocess.run(
        _command(*arguments),
        cwd=ROOT,
        env=_environment(),
        stdout=sys.stderr if showing else subprocess.PIPE,
        text=True,
    )
    if done.returncode != 0:
        raise Failure(f"`buildah {arguments[0]}` failed; its own words are above.")
    return done.stdout or ""


def _command(*arguments: str) -> list[str]:
    store = ["--root", str(BUILD_STORE / "root"), "--runroot", str(BUILD_STORE / "run")]
    # Else the store mounts itself upon itself, and nothing could be hard-linked out of it.
    return ["buildah", *store, "--storage-opt", "overlay.skip_mount_home=true", *arguments]


def _environment() -> dict[str, str]:
    SCRATCH.mkdir(parents=True, exist_ok=True)
    return {**os.environ, "TMPDIR": str(SCRATCH)}
