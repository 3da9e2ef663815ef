"""Where a model comes from: a directory in the hub's layout, or a hub id. No torch here: the engine reads it too."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from lockstep_runtime.config import ServeConfig
from lockstep_runtime.host import shm_files
from lockstep_runtime.protocol.bus import LoadFailure
from lockstep_runtime.protocol.status import Download
from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.sources.fetch import Wanted, fetch, resolve
from lockstep_runtime.sources.fetch_state import FetchState, read_state
from lockstep_runtime.sources.files import read_object, unreadable
from lockstep_runtime.sources.hub import Hub
from lockstep_runtime.sources.hub_cache import HubCache
from lockstep_runtime.sources.model_config import check_supported
from lockstep_runtime.sources.repository import is_hub_id

POLL_SECONDS: Final = 0.1
UNTOLD_SECONDS: Final = 30.0  # without a word from the fetcher


class StillFetchingError(ModelError):
    """The pod's fetcher is at it: ask again soon."""


def locate(config: ServeConfig) -> Path:
    """The directory that holds the model. A hub's is fetched by the pod's fetcher; where there is no supervisor that
    started one, here and now.

    Raises:
        StillFetchingError: it is not there yet.
        ModelError: there is no such directory, it may not be read, or the hub could not deliver it.
    """
    if (folder := find_folder(config.model)) is not None:
        return folder
    path = shm_files.fetch_file(os.environ)
    if path is None:
        return find_model(config.model, config.model_revision, str(cache_folder(config)))
    state = read_state(path)
    if state.folder:
        return Path(state.folder)
    if state.error:
        raise ModelError(state.error, kind=state.failure)
    raise StillFetchingError(f"{config.model} is being fetched", kind=LoadFailure.TRANSIENT)


def commit_of(config: ServeConfig) -> str:
    """Of a hub's model, as far as this pod knows it; empty: not yet, or it is a folder."""
    path = shm_files.fetch_file(os.environ)
    if not is_hub_model(config.model) or path is None:
        return ""
    return read_state(path).commit


def await_model(config: ServeConfig, tell: Callable[[Download, int], None]) -> Path:
    """The same, as soon as it is there. `tell(download, bytes moved)` is called whenever the fetcher has got further.

    Raises:
        ModelError: as `locate`.
    """
    told, begun = None, time.monotonic()
    while True:
        try:
            return locate(config)
        except StillFetchingError:
            state = read_state(path) if (path := shm_files.fetch_file(os.environ)) else None
        if state == FetchState() and time.monotonic() - begun > UNTOLD_SECONDS:
            words = f"{config.model}: the group's first pod has not found out yet which commit is to be loaded"
            raise ModelError(words, kind=LoadFailure.TRANSIENT)
        if state is not None and state.download is not None and state != told:
            told = state
            tell(state.download, state.moved)
        time.sleep(POLL_SECONDS)


def cache_folder(config: ServeConfig) -> Path:
    """Where models of the configuration's hub are kept."""
    given = config.download_dir or config.source.cache
    if given:
        return Path(given).expanduser()
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def is_hub_model(model: str) -> bool:
    """Whether it is no directory here, and may be a hub's.

    Raises:
        ModelError: as `find_folder`.
    """
    return find_folder(model) is None


def find_folder(model: str) -> Path | None:
    """The directory of this name; None: there is none, and it may be a hub's id.

    Raises:
        ModelError: it may not be read, or the name is a path.
    """
    path = Path(model).expanduser()
    if _is_folder(path):
        return path
    if path.is_symlink() or not is_hub_id(model):
        raise ModelError(f"the model directory can't be found: {unreadable(path, FileNotFoundError())}")
    return None


def find_model(model: str, revision: str | None = None, download_dir: str | None = None) -> Path:
    """The directory that holds the model, downloaded first, by this process, when `model` is a hub id.

    Processes that share a cache may call this at once: one of them downloads.

    Raises:
        ModelError: there is no such directory, it may not be read, or the hub could not deliver it.
    """
    if (folder := find_folder(model)) is not None:
        return folder
    cache = cache_folder(ServeConfig(model=model, served_name=model, download_dir=download_dir))
    wanted = Wanted(repo=model, cache=HubCache(cache, model), hub=Hub(None, None), revision=revision)
    return fetch(wanted, resolve(wanted)).folder


def _is_folder(path: Path) -> bool:
    try:
        if not stat.S_ISDIR(path.stat().st_mode):
            raise ModelError(f"{path} is a file: give the folder that holds config.json and the safetensors files")
        with os.scandir(path):
            return True
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise ModelError(f"the model directory can't be used: {unreadable(path, error)}") from error


def read_config(directory: Path) -> Mapping[str, Any]:
    """The model's config.json.

    Raises:
        ModelError: it is missing, is not a JSON object, or asks for what can't be served.
    """
    path = directory / "config.json"
    config = read_object(path)
    if config is None:
        raise ModelError(f"{path} is missing: the directory holds no model in the hub's layout")
    check_supported(config)
    return config
