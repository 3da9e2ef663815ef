"""One repository in the hub's cache on disk, laid out as huggingface_hub does: each finds what the other fetched.

    models--org--name/blobs/<etag>            contents; `<etag>.lockstep-part` is one on its way
    models--org--name/snapshots/<commit>/…    links to them, by their names in the repository
    models--org--name/refs/<revision>         the commit that a branch or tag was when it was last asked for
    models--org--name/lockstep/<commit>.json  ours: which files a model is, and what was known of them when checked

Source: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import msgspec

from lockstep_runtime.sources.repository import COMMIT, RemoteFile

MISSING: Final = "is missing"
CHUNK_BYTES: Final = 4 * 1024 * 1024
Moved = Callable[[int], None]  # so many bytes were received or read


class Checked(msgspec.Struct, frozen=True):
    """A file that had the right contents when it had this time."""

    path: str
    size: int
    blob_id: str
    sha256: str | None = None
    mtime_ns: int = 0  # 0: not checked yet

    def remote(self) -> RemoteFile:
        return RemoteFile(path=self.path, size=self.size, blob_id=self.blob_id, sha256=self.sha256)


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """All files that a model is, at one commit."""

    files: tuple[Checked, ...]


class HubCache:
    """`root` is the cache's folder, in which every repository has its own."""

    def __init__(self, root: Path, repo: str) -> None:
        self.root, self.repo = root, repo
        self.folder = root / f"models--{repo.replace('/', '--')}"
        self.lock = root / ".locks" / self.folder.name / "lockstep.lock"

    def snapshot(self, commit: str) -> Path:
        return self.folder / "snapshots" / commit

    def part(self, file: RemoteFile) -> Path:
        """Where as much of the file is as has come."""
        return self.folder / "blobs" / f"{file.etag}.lockstep-part"

    def ref(self, revision: str) -> str | None:
        """The commit that this branch or tag was when it was last asked for."""
        try:
            found = (self.folder / "refs" / revision).read_text().strip()
        except OSError:
            return None
        return found if COMMIT.fullmatch(found) else None

    def set_ref(self, revision: str, commit: str) -> None:
        """Best effort: it serves when the hub is away."""
        with contextlib.suppress(OSError):
            write_atomically(self.folder / "refs" / revision, commit.encode())

    def manifest(self, commit: str) -> Manifest | None:
        try:
            return msgspec.json.decode(self._manifest(commit).read_bytes(), type=Manifest)
        except (OSError, msgspec.MsgspecError):
            return None

    def write_manifest(self, commit: str, files: Iterable[RemoteFile]) -> None:
        """Best effort: without one the files are checked again."""
        checked = tuple(Checked(one.path, one.size, one.blob_id, one.sha256, self._time(commit, one)) for one in files)
        with contextlib.suppress(OSError):
            write_atomically(self._manifest(commit), msgspec.json.encode(Manifest(files=checked)))

    def flaw(self, commit: str, file: RemoteFile, checked: Checked | None, moved: Moved) -> str:
        """What is wrong with the file that is here; empty: nothing. Its contents are read only where it has another
        time than when it was checked.

        Raises:
            OSError: it can't be read.
        """
        path = self.snapshot(commit) / file.path
        try:
            found = path.stat()
        except FileNotFoundError:
            return MISSING
        if found.st_size != file.size:
            return f"has {found.st_size} bytes instead of {file.size}"
        if checked is not None and checked.mtime_ns == found.st_mtime_ns and checked.remote() == file:
            return ""
        digest = file.digest
        with path.open("rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
                moved(len(chunk))
        return "" if digest.found == digest.expected else f"has the {digest.name} {digest.found}, not {digest.expected}"

    def discard(self, commit: str, file: RemoteFile) -> None:
        """A file that is not what it should be, and the blob that it links to."""
        path = self.snapshot(commit) / file.path
        blob = path.resolve()
        path.unlink(missing_ok=True)
        if blob.is_relative_to(self.folder.resolve()):
            blob.unlink(missing_ok=True)

    def publish(self, commit: str, file: RemoteFile) -> None:
        """The part is whole: make it the file.

        Raises:
            OSError: the disk refuses.
        """
        blob, path = self.folder / "blobs" / file.etag, self.snapshot(commit) / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.part(file).replace(blob)
        link(blob, path)

    def adopt(self, commit: str, file: RemoteFile) -> None:
        """Another commit may have the same file: link to it."""
        blob, path = self.folder / "blobs" / file.etag, self.snapshot(commit) / file.path
        if not os.path.lexists(path) and blob.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            link(blob, path)

    def _manifest(self, commit: str) -> Path:
        return self.folder / "lockstep" / f"{commit}.json"

    def _time(self, commit: str, file: RemoteFile) -> int:
        with contextlib.suppress(OSError):
            return (self.snapshot(commit) / file.path).stat().st_mtime_ns
        return 0


def link(blob: Path, path: Path) -> None:
    """Where the file system knows no links, the blob becomes the file."""
    path.unlink(missing_ok=True)
    try:
        path.symlink_to(os.path.relpath(blob, path.parent))
    except OSError:
        blob.replace(path)


def write_atomically(path: Path, content: bytes) -> None:
    """
    Raises:
        OSError: the disk refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
