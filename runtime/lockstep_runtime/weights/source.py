"""Where a model comes from: a directory in the hub's layout, or a hub id. No torch here: the engine reads it too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lockstep_runtime.weights.errors import ModelError

MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


def find_model(model: str, revision: str | None = None, download_dir: str | None = None) -> Path:
    """The directory that holds the model, downloaded first when `model` is a hub id.

    Ranks of one pod may call this at once: huggingface_hub locks each file.

    Raises:
        ModelError: there is no such directory, or the hub could not deliver it.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ModelError(f"the model directory {model} does not exist")
    return _download(model, revision, download_dir)


def _download(model: str, revision: str | None, download_dir: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        found = snapshot_download(model, revision=revision, cache_dir=download_dir, allow_patterns=MODEL_FILES)
    except (OSError, ValueError, HFValidationError) as error:  # hub errors are OSErrors or ValueErrors
        raise ModelError(
            f"{model} is no directory here, and the hub did not deliver it: {type(error).__name__}: {error}"
        ) from error
    return Path(found)


def read_config(directory: Path) -> Mapping[str, Any]:
    """The model's config.json.

    Raises:
        ModelError: it is missing or is not a JSON object.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: the directory holds no model in the hub's layout") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} can't be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object")
    return config
