"""The image that holds a pod's namespaces open, made from our own static program: nothing is pulled from anywhere."""

import hashlib
import io
import json
import tarfile

from dev.cluster import containers
from dev.cluster.layout import CONTAINERD_SOCKET, PAUSE, PAUSE_IMAGE, SCRATCH
from dev.cluster.progress import Failure


def load() -> None:
    """Load it unless containerd has it."""
    if PAUSE_IMAGE in _images():
        return
    SCRATCH.mkdir(parents=True, exist_ok=True)
    archive = SCRATCH / "pause.tar"
    archive.write_bytes(image(PAUSE.read_bytes()))
    containers.import_archive(archive)
    archive.unlink()


def image(program: bytes) -> bytes:
    """An image of one file in Docker's archive format, the same bytes for the same program."""
    layer = _tar({"pause": program}, mode=0o755)
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Entrypoint": ["/pause"], "User": "65535:65535"},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [PAUSE_IMAGE], "Layers": ["layer.tar"]}]
    return _tar(
        {
            "config.json": json.dumps(config).encode(),
            "layer.tar": layer,
            "manifest.json": json.dumps(manifest).encode(),
        },
        mode=0o644,
    )


def _tar(members: dict[str, bytes], mode: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), mode
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def _images() -> str:
    if not CONTAINERD_SOCKET.exists():
        raise Failure("containerd did not make its socket; see .dev/logs/containerd.log.")
    return containers.ctr("images", "list", "--quiet")
