"""Brings a model from a hub into the cache: only what is missing there, once for all who share it, checked.

What is complete and pinned to a commit is used without a request, and without importing the hub's library.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lockstep_runtime.sources import hub_errors
from lockstep_runtime.sources.errors import ModelError, may_pass
from lockstep_runtime.sources.files import read_object
from lockstep_runtime.sources.hub import Hub
from lockstep_runtime.sources.hub_cache import MISSING, Checked, HubCache
from lockstep_runtime.sources.lease import Lease, Progress, leased
from lockstep_runtime.sources.model_config import check_supported
from lockstep_runtime.sources.repository import COMMIT, INDEX, RemoteFile, beside_weights, weights

logger = logging.getLogger(__name__)

DEFAULT_REVISION: Final = "main"
AT_ONCE: Final = 4  # files
SPARE_BYTES: Final = 16 * 1024 * 1024  # that a download leaves free on the disk
_TRUE: Final = frozenset({"1", "ON", "YES", "TRUE"})  # as huggingface_hub reads its variables
Tell = Callable[[Progress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A model of a hub. `commit`: what the revision is, where that has been decided already."""

    repo: str
    cache: HubCache
    hub: Hub
    revision: str | None = None
    commit: str | None = None

    def __str__(self) -> str:
        return self.repo


@dataclass(frozen=True, slots=True)
class Fetched:
    folder: Path
    commit: str


def is_offline() -> bool:
    return any(os.environ.get(name, "").upper() in _TRUE for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def resolve(wanted: Wanted) -> str:
    """The commit to load. A branch or a tag is asked for, and found in the cache while the hub is away.

    Raises:
        ModelError: nobody knows.
    """
    revision = wanted.revision or DEFAULT_REVISION
    if given := wanted.commit or (revision if COMMIT.fullmatch(revision) else None):
        return given
    known = wanted.cache.ref(revision)
    if is_offline():
        if known is None:
            raise hub_errors.offline(wanted.repo, f"{revision} was never fetched")
        return known
    try:
        commit = wanted.hub.resolve(wanted.repo, revision)
    except ModelError as error:
        if known is None or not may_pass(error) or _lack(wanted.cache, known):
            raise
        logger.warning("%s; %s is taken to be %s, as in the cache", error, revision, known)
        return known
    if commit != known:
        wanted.cache.set_ref(revision, commit)
    return commit


def fetch(wanted: Wanted, commit: str, tell: Tell = lambda _: None) -> Fetched:
    """The folder with all of the model's files. Blocks; `tell` is called from any thread.

    Raises:
        ModelError: it could not be brought here whole.
    """
    try:
        if lack := _lack(wanted.cache, commit, tell):
            _complete(wanted, commit, lack, tell)
    except OSError as error:
        raise hub_errors.explain(wanted.repo, commit, error, wanted.hub.endpoint) from error
    return Fetched(wanted.cache.snapshot(commit), commit)


def _lack(cache: HubCache, commit: str, tell: Tell = lambda _: None) -> str:
    """What the cache lacks of the model, in words; empty: nothing. Makes no request."""
    manifest = cache.manifest(commit)
    if manifest is None:
        return _apparent_lack(cache, commit) if is_offline() else f"commit {commit} was not fetched"
    count = _Count(tell, sum(one.size for one in manifest.files))
    lacks = ""
    for one in manifest.files:
        if flaw := _flaw(cache, commit, one.remote(), one, count):
            lacks = lacks or f"{one.path} {flaw}"
        else:
            count.add(one.size, moved=0)
    if not lacks and any(
        one.mtime_ns != (cache.snapshot(commit) / one.path).stat().st_mtime_ns for one in manifest.files
    ):
        cache.write_manifest(commit, [one.remote() for one in manifest.files])
    return lacks


def _apparent_lack(cache: HubCache, commit: str) -> str:
    """Of a cache that others filled, with nobody to ask: by what the files say of each other."""
    folder = cache.snapshot(commit)
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    if not names:
        return f"commit {commit} was not fetched"
    files = [RemoteFile(name, (folder / name).stat().st_size, "") for name in names]
    try:
        weights(cache.repo, files, read_object(folder / INDEX))
    except ModelError as error:
        return str(error)
    return "" if "config.json" in names else "config.json is missing"


def _flaw(cache: HubCache, commit: str, file: RemoteFile, checked: Checked | None, count: _Count) -> str:
    """A file that is here and wrong is thrown away, where it may be fetched again."""
    found = cache.flaw(commit, file, checked, count.read)
    if found and found != MISSING and not is_offline():
        logger.warning("%s of %s %s in the cache (%s): it is fetched again", file.path, cache.repo, found, cache.folder)
        cache.discard(commit, file)
    return found


def _complete(wanted: Wanted, commit: str, lack: str, tell: Tell) -> None:
    cache = wanted.cache
    if is_offline():
        raise hub_errors.offline(wanted.repo, lack)
    with leased(cache.lock, tell) as lease:
        if not _lack(cache, commit, tell):  # by whom we waited for
            return
        listed = wanted.hub.files(wanted.repo, commit)
        beside = beside_weights(listed)
        _download(wanted, commit, beside, beside, lease, tell)
        # What can't be served is told before its weights are fetched.
        check_supported(read_object(cache.snapshot(commit) / "config.json") or {})
        every = [*beside, *weights(wanted.repo, listed, read_object(cache.snapshot(commit) / INDEX))]
        _download(wanted, commit, every, every[len(beside) :], lease, tell)
        cache.write_manifest(commit, every)


def _download(
    wanted: Wanted, commit: str, every: Sequence[RemoteFile], now: Sequence[RemoteFile], lease: Lease, tell: Tell
) -> None:
    """`now` of `every`; those that are here and right stay."""
    cache = wanted.cache

    def both(progress: Progress) -> None:
        tell(progress)
        lease.tell(progress)

    count = _Count(both, sum(one.size for one in every))
    count.add(sum(one.size for one in every) - sum(one.size for one in now), moved=0)
    missing: list[RemoteFile] = []
    for file in now:
        cache.adopt(commit, file)
        if _flaw(cache, commit, file, None, count):
            missing.append(file)
            count.add(_size(cache.part(file)), moved=0)
        else:
            count.add(file.size, moved=0)
    _check_room(wanted, missing)

    def one(file: RemoteFile) -> None:
        wanted.hub.transfer(wanted.repo, commit, file, cache.part(file), lambda moved: count.add(moved))
        cache.publish(commit, file)

    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="download") as pool:
        jobs = [pool.submit(one, file) for file in missing]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _check_room(wanted: Wanted, missing: Sequence[RemoteFile]) -> None:
    root = wanted.cache.root
    needed = sum(max(0, one.size - _size(wanted.cache.part(one))) for one in missing)
    free = shutil.disk_usage(root).free
    if needed and needed + SPARE_BYTES > free:
        raise hub_errors.no_room(wanted.repo, needed, free, root)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


class _Count:
    """Adds up what several threads move."""

    def __init__(self, tell: Tell, total: int) -> None:
        self._tell, self._total = tell, total
        self._done = self._moved = 0
        self._lock = threading.Lock()

    def add(self, done: int, *, moved: int | None = None) -> None:
        """So many more bytes are where they should be; `moved` of them just now (all, if it isn't given)."""
        with self._lock:
            self._done += done
            self._moved += max(0, done if moved is None else moved)
            progress = Progress(done=self._done, total=self._total, moved=self._moved)
        self._tell(progress)

    def read(self, moved: int) -> None:
        """So many bytes were read to be checked."""
        self.add(0, moved=moved)
