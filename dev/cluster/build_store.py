"""Hand an image from buildah's store to containerd without copying it.

The plain way (push to an archive, import it) writes torch's five gigabytes three times more. But both stores keep a
layer as the same thing, a folder of overlayfs with its whiteouts, and both lie in .dev: so the layer's files are
hard-linked into a new snapshot, which is committed under the chain id that an import would look for. The import that
follows carries only the manifest and the configuration, and finds every layer unpacked already.

Both sides treat layers as read-only, so shared inodes are safe; either may delete its links.
"""

import base64
import hashlib
import io
import json
import shlex
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dev.cluster import containers
from dev.cluster.layout import BUILD_STORE, SCRATCH
from dev.cluster.progress import Failure

GRAPH: Final = BUILD_STORE / "root"


@dataclass(frozen=True, slots=True)
class Image:
    """An image in buildah's store; `layers` are the folders of its layers, the lowest first."""

    manifest: bytes
    config: bytes
    diff_ids: tuple[str, ...]
    layers: tuple[Path, ...]


def load(name: str) -> None:
    """Make the image `name` of buildah's store (`localhost/lockstep/x:dev`) known to the cluster by the same name."""
    image = find(name)
    chain = chain_ids(image.diff_ids)
    present = {line.split()[0] for line in containers.ctr("snapshots", "list").splitlines()[1:] if line}
    made = []
    for index, key in enumerate(chain):
        if key not in present:
            _make_snapshot(key, chain[index - 1] if index else "", image.layers[index])
            made.append(key)
    archive = SCRATCH / "image.tar"
    SCRATCH.mkdir(parents=True, exist_ok=True)
    archive.write_bytes(layout(image, name))
    containers.import_archive(archive)
    archive.unlink()
    for key in made:  # from here on the image's own reference keeps them, and lets them go with it
        containers.ctr("snapshots", "label", key, "containerd.io/gc.root=")


def find(name: str) -> Image:
    entry = next((each for each in _read("images") if name in each.get("names", [])), None)
    if entry is None:
        raise Failure(f"buildah's store has no image {name}")
    folder = GRAPH / "overlay-images" / entry["id"]
    config = (folder / _file_name(f"sha256:{entry['id']}")).read_bytes()
    diff_ids = tuple(json.loads(config)["rootfs"]["diff_ids"])
    return Image((folder / "manifest").read_bytes(), config, diff_ids, _layer_folders(entry["layer"], diff_ids))


def chain_ids(diff_ids: tuple[str, ...]) -> list[str]:
    """The name of each layer together with all below it (OCI image specification, config, "Layer ChainID")."""
    chain: list[str] = []
    for diff_id in diff_ids:
        chain.append(_digest(f"{chain[-1]} {diff_id}".encode()) if chain else diff_id)
    return chain


def layout(image: Image, name: str) -> bytes:
    """An OCI archive of the image without its layers."""
    manifest_type = json.loads(image.manifest).get("mediaType", "application/vnd.oci.image.manifest.v1+json")
    reference = {
        "mediaType": manifest_type,
        "digest": _digest(image.manifest),
        "size": len(image.manifest),
        "annotations": {"io.containerd.image.name": name},
    }
    index = {"schemaVersion": 2, "manifests": [reference]}
    members = {
        "oci-layout": b'{"imageLayoutVersion":"1.0.0"}',
        "index.json": json.dumps(index).encode(),
        f"blobs/sha256/{_digest(image.manifest).partition(':')[2]}": image.manifest,
        f"blobs/sha256/{_digest(image.config).partition(':')[2]}": image.config,
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path, content in members.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def _make_snapshot(key: str, parent: str, layer: Path) -> None:
    working = f"lockstep-{key}"
    subprocess.run(containers.command("snapshots", "remove", working), capture_output=True)  # of an interrupted run
    containers.ctr("snapshots", "prepare", working, *([parent] if parent else []))
    upper = writable_folder(containers.ctr("snapshots", "mounts", "/target", working))
    copied = subprocess.run(["cp", "--archive", "--link", f"{layer}/.", upper], capture_output=True, text=True)
    if copied.returncode != 0:
        raise Failure(f"linking a layer failed: {copied.stderr[:300]}")
    containers.ctr("snapshots", "commit", key, working)


def writable_folder(mount_command: str) -> str:
    """Where a snapshot's own files are, from the `mount` command that ctr prints for it."""
    words = shlex.split(mount_command)
    options = words[words.index("-o") + 1].split(",")
    upper = [option.partition("=")[2] for option in options if option.startswith("upperdir=")]
    return upper[0] if upper else words[words.index("-t") + 2]


def _layer_folders(top: str, diff_ids: tuple[str, ...]) -> tuple[Path, ...]:
    layers = {layer["id"]: layer for layer in _read("layers")}
    folders: list[Path] = []
    current = layers.get(top)
    while current is not None:
        folders.insert(0, GRAPH / "overlay" / current["id"] / "diff")
        current = layers.get(current.get("parent", ""))
    if len(folders) != len(diff_ids):
        raise Failure(f"buildah's store has {len(folders)} layers for an image of {len(diff_ids)}")
    return tuple(folders)


def _read(kind: str) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = json.loads((GRAPH / f"overlay-{kind}" / f"{kind}.json").read_text())
    return content


def _file_name(key: str) -> str:
    """containers/storage names the files of an image so when the key isn't a plain word."""
    return "=" + base64.b64encode(key.encode()).decode()


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
