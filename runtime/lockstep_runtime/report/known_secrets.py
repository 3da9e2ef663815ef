"""The secrets that this process can read: a report leaves them out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from lockstep_runtime.config import API_KEY_FILE_VARIABLE, OPERATOR_TOKEN_FILE_VARIABLE
from lockstep_runtime.redaction import is_secret_name

_MAX_FILE_BYTES: Final = 1 << 20


def known(environment: Mapping[str, str]) -> set[str]:
    """The secrets that this process can read: in variables, and in files: API keys, the operator's token, the
    hub's."""
    values = {value.strip() for name, value in environment.items() if is_secret_name(name)}
    for path in _secret_files(environment):
        try:
            with path.open("rb") as file:
                text = file.read(_MAX_FILE_BYTES).decode(errors="replace")
        except OSError:
            continue
        lines = (line.strip() for line in text.splitlines())
        values |= {part for line in lines for part in (line, line.rpartition("=")[2].strip())}
    return values - {""}


def _secret_files(environment: Mapping[str, str]) -> list[Path]:
    home = Path(environment.get("HF_HOME") or Path(environment.get("HOME", "/")) / ".cache" / "huggingface")
    files = [
        environment.get(API_KEY_FILE_VARIABLE),
        environment.get(OPERATOR_TOKEN_FILE_VARIABLE),
        environment.get("HF_TOKEN_PATH") or home / "token",
        environment.get("HF_STORED_TOKENS_PATH") or home / "stored_tokens",
    ]
    return [Path(file) for file in files if file]
