"""The cluster's own containerd, asked through `ctr`."""

import subprocess
from pathlib import Path
from typing import Final

from dev.cluster.layout import CONTAINERD_SOCKET
from dev.cluster.progress import Failure

NAMESPACE: Final = "k8s.io"  # the one in which the kubelet sees images and containers


def command(*arguments: str) -> list[str]:
    return ["ctr", "--address", str(CONTAINERD_SOCKET), "--namespace", NAMESPACE, *arguments]


def ctr(*arguments: str, stdin: bytes | None = None) -> str:
    done = subprocess.run(command(*arguments), input=stdin, capture_output=True)
    if done.returncode != 0:
        raise Failure(f"`ctr {' '.join(arguments)}` failed: {done.stderr.decode().strip()}")
    return done.stdout.decode()


def import_archive(archive: Path) -> None:
    """Load an image from an OCI or Docker archive; layers that containerd already has unpacked may be absent."""
    with archive.open("rb") as stream:
        done = subprocess.run(command("images", "import", "-"), stdin=stream, capture_output=True)
    if done.returncode != 0:
        raise Failure(f"containerd refused {archive.name}: {done.stderr.decode().strip()}")


def forget_replaced_images() -> None:
    """Remove the references by configuration (`sha256:...`) that the CRI plugin made for images now replaced.

    Without one, containerd lets go of an old image's layers; a running container keeps those that it stands on.
    """
    listed = [line.split() for line in ctr("images", "list").splitlines()[1:]]
    named = {fields[2] for fields in listed if not fields[0].startswith("sha256:")}
    for fields in listed:
        if fields[0].startswith("sha256:") and fields[2] not in named:
            ctr("images", "remove", fields[0])


def remove_all() -> None:
    """Every container with its task and its snapshot; images stay."""
    names = ctr("containers", "list", "--quiet").split()
    for name in names:
        subprocess.run(command("tasks", "delete", "--force", name), capture_output=True)
    if names:
        subprocess.run(command("containers", "delete", *names), capture_output=True)
