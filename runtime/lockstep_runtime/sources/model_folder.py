"""Where a model comes from: a directory in the hub's layout, or a hub id. No torch here: the engine reads it too."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.sources.files import read_object, unreadable
from lockstep_runtime.sources.hub import download
from lockstep_runtime.sources.model_config import check_supported

MODEL_FILES: Final = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


def find_model(model: str, revision: str | None = None, download_dir: str | None = None) -> Path:
    """The directory that holds the model, downloaded first when `model` is a hub id.

    Ranks of one pod may call this at once: huggingface_hub locks each file.

    Raises:
        ModelError: there is no such directory, it may not be read, or the hub could not deliver it.
    """
    path = Path(model).expanduser()
    if _is_folder(path):
        return path
    if path.is_absolute() or path.is_symlink() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ModelError(f"the model directory can't be found: {unreadable(path, FileNotFoundError())}")
    # What can't be served is told before its weights are fetched.
    check_supported(read_config(download(model, revision, download_dir, ["config.json"])))
    return download(model, revision, download_dir, MODEL_FILES)


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
