"""Reading a model's files: whatever keeps one from being read is a sentence with its path and what to do."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final

from lockstep_runtime.sources.errors import ModelError

LFS_POINTER: Final = b"version https://git-lfs.github.com/spec/"
_BYTE_ORDER_MARKS: Final = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")


def unreadable(path: Path, error: OSError) -> str:
    """Why the system does not let us read `path`."""
    if isinstance(error, PermissionError):
        user = f"user {os.geteuid()} (group {os.getegid()})"
        if closed := _closed_folder(path):
            return f"Permission denied: {user} may not enter {closed}, and so not read {path}; give it the right to"
        return f"Permission denied: {user} may not read {path}; give it the right to"
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return _missing(path)
    if isinstance(error, IsADirectoryError):
        return f"{path} is a folder, where a file is expected"
    return f"{path} can't be read: {error.strerror or error}"


def read_bytes(path: Path) -> bytes | None:
    """The file; None where there is none.

    Raises:
        ModelError: it is there and can't be read, or is a link to nowhere.
    """
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        if path.is_symlink():
            raise ModelError(unreadable(path, error)) from error
        return None
    except OSError as error:
        raise ModelError(unreadable(path, error)) from error
    if content.startswith(LFS_POINTER):
        raise ModelError(lfs_pointer(path))
    return content


def read_text(path: Path) -> str | None:
    """The same, of UTF-8."""
    content = read_bytes(path)
    if content is None:
        return None
    if content.startswith(_BYTE_ORDER_MARKS):
        raise ModelError(f"{path} begins with a byte order mark: save it as UTF-8 without one")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        byte = content[error.start]
        raise ModelError(
            f"{path} is not UTF-8: line {line} has the byte 0x{byte:02X} (Latin-1, perhaps); save it as UTF-8"
        ) from error


def read_object(path: Path) -> dict[str, Any] | None:
    """The same, of a JSON object."""
    text = read_text(path)
    if text is None:
        return None
    if not text.strip():
        raise ModelError(f"{path} is empty: its download or copy was cut short")
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise ModelError(f"{path} is not valid JSON: it is nested too deep") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} should hold a JSON object")
    return value


def lfs_pointer(path: Path) -> str:
    return f"{path} is a Git LFS pointer, not the file itself: fetch it (`git lfs pull` in the clone) and copy it again"


def _missing(path: Path) -> str:
    for part in (path, *path.parents):
        if part.is_symlink() and not os.path.exists(part):  # noqa: PTH110 - of pathlib's, some raise
            return f"{part} is a link to {part.readlink()}, which does not exist here: mount or copy what it names"
    return f"{path} does not exist"


def _closed_folder(path: Path) -> Path | None:
    """The outermost folder above `path` that we may not enter."""
    return next((folder for folder in reversed(path.absolute().parents) if not os.access(folder, os.X_OK)), None)
