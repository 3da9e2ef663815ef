"""Which `lockstep serve` run on this machine: files that `lockstep inject` and `lockstep report` read, one each."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

logger = logging.getLogger(__name__)
_PATTERN: Final = "serve-*.json"


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """One `lockstep serve` and where its supervisor serves the status."""

    pid: int
    model: str
    port: int  # of its API
    status_url: str
    token: str = ""  # the group's, if it made one for itself: only this user may read the file
    faults: bool = True  # on purpose, are allowed


def folder(environment: Mapping[str, str] = os.environ) -> Path:
    """This user's own."""
    place = environment.get("XDG_RUNTIME_DIR")
    return Path(place) / "lockstep" if place else Path(tempfile.gettempdir()) / f"lockstep-{os.getuid()}"


def leave(one: Running) -> None:
    """Without a place for it, the two commands must be given the URL."""
    place = folder()
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        if place.stat().st_uid != os.getuid() or place.is_symlink():
            raise PermissionError(0, "it is another user's")
        place.chmod(0o700)
        new = place / f"new-{one.pid}"
        new.touch(mode=0o600)
        new.write_bytes(msgspec.json.encode(one))
        new.rename(_path(one.pid))
    except OSError as error:
        logger.info("`lockstep inject` and `lockstep report` need --url: %s: %s", place, error.strerror)


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


def choose(serving: Sequence[Running], otherwise: str) -> tuple[str, str]:
    """The status URL of the only one, or `otherwise`; and what is wrong if there are several."""
    if len(serving) > 1:
        listed = ", ".join(f"--url {one.status_url} ({one.model} on port {one.port})" for one in serving)
        return "", f"several serve on this machine; choose one: {listed}"
    return (serving[0].status_url if serving else otherwise), ""


def token_of(url: str, serving: Sequence[Running]) -> str:
    """The token that the group at this URL made for itself; empty if it was given one."""
    return next((one.token for one in serving if one.status_url == url), "")


def _path(pid: int) -> Path:
    return folder() / f"serve-{pid}.json"
