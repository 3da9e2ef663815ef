"""What serves on this machine and lets faults happen: files that `lockstep inject` reads, one for each supervisor."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

logger = logging.getLogger(__name__)
_PATTERN: Final = "serve-*.json"


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """One `lockstep serve`. `port` is its API's."""

    pid: int
    model: str
    port: int
    status_url: str


def folder(environment: Mapping[str, str] = os.environ) -> Path:
    """This user's own."""
    place = environment.get("XDG_RUNTIME_DIR")
    return Path(place) / "lockstep" if place else Path(tempfile.gettempdir()) / f"lockstep-{os.getuid()}"


def leave(one: Running) -> None:
    """Without a place for it, `lockstep inject` must be told the URL."""
    place = folder()
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        if place.stat().st_uid != os.getuid() or place.is_symlink():
            raise PermissionError(0, "it is another user's")
        new = place / f"new-{one.pid}"
        new.write_bytes(msgspec.json.encode(one))
        new.rename(_path(one.pid))
    except OSError as error:
        logger.info("`lockstep inject` needs --url: %s: %s", place, error.strerror)


def forget(pid: int) -> None:
    with contextlib.suppress(OSError):
        _path(pid).unlink()


def found() -> list[Running]:
    """Those that still run; what the others left goes."""
    alive = []
    for path in sorted(folder().glob(_PATTERN)):
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            one = msgspec.json.decode(path.read_bytes(), type=Running)
            if Path(f"/proc/{one.pid}").exists():
                alive.append(one)
            else:
                path.unlink()
    return alive


def _path(pid: int) -> Path:
    return folder() / f"serve-{pid}.json"
