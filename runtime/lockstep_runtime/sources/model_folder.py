"""Where a model comes from: a directory in the hub's layout, or a hub id. No torch here: the engine reads it too."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.sources.fetch import Wanted, fetch, resolve
from lockstep_runtime.sources.files import read_object, unreadable
from lockstep_runtime.sources.hub import Hub
from lockstep_runtime.sources.hub_cache import HubCache
from lockstep_runtime.sources.model_config import check_supported
from lockstep_runtime.sources.repository import is_hub_id


def find_model(model: str, revision: str | None = None, download_dir: str | None = None) -> Path:
    """The directory that holds the model, downloaded first when `model` is a hub id.

    Ranks and pods that share a cache may call this at once: one of them downloads.

    Raises:
        ModelError: there is no such directory, it may not be read, or the hub could not deliver it.
    """
    path = Path(model).expanduser()
    if _is_folder(path):
        return path
    if path.is_symlink() or not is_hub_id(model):
        raise ModelError(f"the model directory can't be found: {unreadable(path, FileNotFoundError())}")
    from huggingface_hub import constants

    cache = HubCache(Path(download_dir or constants.HF_HUB_CACHE), model)
    wanted = Wanted(repo=model, cache=cache, hub=Hub(None, None), revision=revision)
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
