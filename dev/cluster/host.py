"""Whether this machine can run the cluster, and the Debian packages that it takes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from dev.cluster.layout import CONTAINERD_ROOT, DEV
from dev.cluster.progress import Failure, say

# Debian package: a file of it, so that machines with the same software from elsewhere pass too.
PACKAGES: Final = {
    "containerd": "containerd",
    "runc": "runc",
    "containernetworking-plugins": "/usr/lib/cni/ptp",
    "nftables": "nft",
    "iproute2": "ip",
    "buildah": "buildah",
    "debootstrap": "debootstrap",
}
FREE_GIB_WARM: Final = 3
FREE_GIB_COLD: Final = 20  # binaries, Go's caches, torch's wheels unpacked twice while its layer is committed

WITHOUT_CLUSTER: Final = (
    "Without a cluster, `lockstep serve MODEL --tensor-parallel-size N` runs the same code on one machine and needs "
    "neither root nor Kubernetes; with a cluster of your own, use `make demo CONTEXT=<kubectl context>`."
)


def check() -> None:
    """Raise Failure with everything that stands in the way, and the way around it."""
    problems = list(obstacles())
    if problems:
        raise Failure("The embedded cluster can't run here: " + "; ".join(problems) + ".\n" + WITHOUT_CLUSTER)


def obstacles() -> list[str]:
    found = []
    if sys.platform != "linux":
        return [f"it needs Linux, and this is {sys.platform}"]
    if os.geteuid() != 0:
        found.append("it needs root (namespaces, mounts and nftables are its trade)")
    need = FREE_GIB_WARM if CONTAINERD_ROOT.exists() else FREE_GIB_COLD
    DEV.mkdir(exist_ok=True)
    free = shutil.disk_usage(DEV).free / 2**30
    if free < need:
        found.append(f"{DEV} has {free:.1f} GiB free and needs {need}")
    if not any(Path(path).exists() for path in ("/sys/fs/cgroup/cgroup.controllers", "/sys/fs/cgroup/memory")):
        found.append("no cgroups are mounted at /sys/fs/cgroup")
    return found


def install_packages() -> None:
    """Install what is missing by apt-get; instant when nothing is."""
    missing = [package for package, program in PACKAGES.items() if not _present(program)]
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise Failure(f"Missing: {', '.join(missing)} (their Debian names), and there is no apt-get to install them.")
    say(f"installing {' '.join(missing)} by apt-get")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing]
    if subprocess.run(install, env=quiet, capture_output=True).returncode == 0:
        return
    subprocess.run(["apt-get", "update", "-qq"], env=quiet, check=False)
    if subprocess.run(install, env=quiet, stdout=sys.stderr).returncode != 0:
        raise Failure(f"apt-get could not install {' '.join(missing)}; its own words are above.")


def _present(program: str) -> bool:
    return Path(program).exists() if program.startswith("/") else shutil.which(program) is not None
