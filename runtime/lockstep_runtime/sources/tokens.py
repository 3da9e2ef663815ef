"""Tokens of hubs: whose environment has them, and whose has not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from lockstep_runtime.config import Source
from lockstep_runtime.sources.errors import ModelError
from lockstep_runtime.sources.files import unreadable

DEFAULT_SOURCE: Final = Source()
_LIBRARY: Final = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")  # that huggingface_hub reads


def given_token(source: Source, environment: Mapping[str, str]) -> str:
    """That the source's variable holds; empty: none."""
    return environment.get(source.token_variable or "", "").strip()


def without_tokens(source: Source, environment: Mapping[str, str]) -> dict[str, str]:
    """What children may have: no worker needs a hub."""
    hidden = {*_LIBRARY, source.token_variable}
    return {name: value for name, value in environment.items() if name not in hidden}


def token_of(source: Source, given: str) -> str | bool | None:
    """As huggingface_hub takes it. Where none was given, that of `hf auth login` is for the default hub alone.

    Raises:
        ModelError: its file can't be read.
    """
    return _from_file(source.token_file) or given or (None if source.endpoint is None else False)


def _from_file(file: str | None) -> str:
    try:
        return Path(file).read_text().strip() if file else ""
    except FileNotFoundError:
        return ""  # a Secret that may be absent
    except OSError as error:
        raise ModelError(f"the hub's token can't be read: {unreadable(Path(file or ''), error)}") from error
