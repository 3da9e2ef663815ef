"""Build the images from their Dockerfiles, on a local base, and load them into the cluster.

A build downloads and writes, while building the cluster's programs computes: the first time they run side by side.
"""

import hashlib
import os
import subprocess
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TextIO

from dev.cluster import build_store, containers, host, lifecycle, toolchain
from dev.cluster.layout import BUILD_STORE, DEV, ROOT, SCRATCH
from dev.cluster.progress import Failure, say

BASE: Final = "localhost/lockstep/base:dev"
LOCAL: Final = "localhost/lockstep/{}:dev"  # buildah's name for an image of no registry; the cluster's too
CODE: Final = "localhost/lockstep/{}-code:dev"  # the stage that builds the wheel, named so that `_prune` leaves it
NAMES: Final = ("operator", "runtime")
# The machine's ways to the package index, which are no business of a Dockerfile.
MOUNTED: Final = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pip.conf", "/etc/uv/uv.toml")
# What of the build's output is shown: the rest is in the log.
SHOWN: Final = ("Downloaded ", "Prepared ", "Installed ", "Bytecode compiled ")
_SUITE: Final = "bookworm"
_BASE_PACKAGES: Final = "python3,python3-venv,ca-certificates"


def make(names: tuple[str, ...] = NAMES) -> None:
    """Build what changed, bring the cluster up, and load into it what it has not."""
    host.check()
    host.install_packages()
    with ThreadPoolExecutor(max_workers=1) as beside:
        builds = beside.submit(_build_all, names)
        toolchain.ensure()
        builds.result()
    lifecycle.up()
    for name in names:
        _load(name)
    containers.forget_replaced_images()
    _prune()


def inputs_digest(name: str) -> str:
    """A digest of everything that goes into an image: what .dockerignore lets through, and the Dockerfile."""
    digest = hashlib.sha256()
    for path in sorted(inputs(name)):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def inputs(name: str) -> list[Path]:
    single = [f"images/{name}.Dockerfile", f"requirements/{name}.txt", "images/installer.txt"]
    single += ["pyproject.toml", "README.md", "LICENSE", ".dockerignore", "docs/troubleshooting.md"]
    models = ["examples/tiny-chat"] if name == "runtime" else []
    trees = [path for tree in ("operator", "runtime", *models) for path in (ROOT / tree).rglob("*")]
    return [ROOT / path for path in single] + [
        path for path in trees if path.is_file() and path.suffix not in {".pyc", ".so"}
    ]


def _build_all(names: tuple[str, ...]) -> None:
    for name in names:
        _build(name)


def _build(name: str) -> None:
    digest = inputs_digest(name)  # taken before the build: what changes meanwhile is for the next one
    if _read(_built(name)) == digest and _exists(LOCAL.format(name)):
        return
    if not _exists(BASE):
        _make_base()
    dockerfile = f"images/{name}.Dockerfile"
    say(f"building lockstep/{name}:dev (its dependencies take minutes when they changed, else seconds)")
    _bud(dockerfile, CODE.format(name), "--target", "code")
    _bud(dockerfile, LOCAL.format(name))
    _built(name).parent.mkdir(parents=True, exist_ok=True)
    _built(name).write_text(digest)


def _load(name: str) -> None:
    digest = _read(_built(name))
    if _read(_stamp(name)) == digest and LOCAL.format(name) in containers.ctr("images", "list", "--quiet").split():
        say(f"image lockstep/{name}:dev is up to date")
        return
    build_store.load(LOCAL.format(name))
    _stamp(name).write_text(digest)
    say(f"loaded lockstep/{name}:dev")


def _bud(dockerfile: str, tag: str, *options: str) -> None:
    volumes = [f"--volume={path}:{path}:ro" for path in MOUNTED if Path(path).exists()]
    local = ["--layers", "--isolation=chroot", "--network=host", "--pull-never", f"--build-arg=BASE={BASE}"]
    command = _command("bud", *local, *volumes, *options, f"--file={dockerfile}", f"--tag={tag}", ".")
    build = subprocess.Popen(
        command, cwd=ROOT, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    last: deque[str] = deque(maxlen=20)
    assert build.stdout is not None
    with _log("images") as log:
        for line in build.stdout:
            log.write(line)
            last.append(line)
            if line.startswith(SHOWN):
                say(f"  {line.strip()}")
    if build.wait() != 0:
        raise Failure(f"The build of {tag} failed (all of it: {log.name}):\n{''.join(last)}")


def _make_base() -> None:
    """Debian with its Python, by debootstrap: the place of python:3.11-slim where no image registry is at hand."""
    say("making a Debian base with Python by debootstrap")
    container = _buildah("from", "scratch").strip()
    folder = _buildah("mount", container).strip()
    debootstrap = ["debootstrap", "--variant=minbase", f"--include={_BASE_PACKAGES}", _SUITE, folder]
    if mirror := os.environ.get("DEBIAN_MIRROR"):
        debootstrap.append(mirror)
    with _log("debootstrap") as log:
        if subprocess.run(debootstrap, stdout=log, stderr=log).returncode != 0:
            raise Failure(f"debootstrap failed; see {log.name}")
    for leftovers in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc"):
        subprocess.run(["find", f"{folder}/{leftovers}", "-type", "f", "-delete"], check=True)
    _buildah("umount", container)
    _buildah("commit", "--quiet", "--rm", container, BASE)


def _prune() -> None:
    """Old versions of the images, and what failed builds left; the parts of named images stay as a cache."""
    subprocess.run(_command("rm", "--all"), capture_output=True, env=_environment())
    subprocess.run(_command("rmi", "--prune"), capture_output=True, env=_environment())


def _exists(image: str) -> bool:
    command = _command("inspect", "--type", "image", image)
    return subprocess.run(command, capture_output=True, env=_environment()).returncode == 0


def _built(name: str) -> Path:
    return DEV / "images" / f"{name}.built.sha256"


def _stamp(name: str) -> Path:
    """Of what is loaded; `dev/deploy` tells the Deployment by it that the image behind the tag is another."""
    return DEV / "images" / f"{name}.sha256"


def _read(stamp: Path) -> str:
    return stamp.read_text() if stamp.exists() else ""


def _buildah(*arguments: str) -> str:
    done = subprocess.run(_command(*arguments), env=_environment(), capture_output=True, text=True)
    if done.returncode != 0:
        raise Failure(f"`buildah {arguments[0]}` failed: {done.stderr.strip()}")
    return done.stdout


def _log(name: str) -> TextIO:
    folder = DEV / "images"  # not among the cluster's logs, which start anew with it
    folder.mkdir(parents=True, exist_ok=True)
    return (folder / f"{name}.log").open("a")


def _command(*arguments: str) -> list[str]:
    store = ["--root", str(BUILD_STORE / "root"), "--runroot", str(BUILD_STORE / "run")]
    # Else the store mounts itself upon itself, and nothing could be hard-linked out of it.
    return ["buildah", *store, "--storage-opt", "overlay.skip_mount_home=true", *arguments]


def _environment() -> dict[str, str]:
    SCRATCH.mkdir(parents=True, exist_ok=True)
    return {**os.environ, "TMPDIR": str(SCRATCH)}
