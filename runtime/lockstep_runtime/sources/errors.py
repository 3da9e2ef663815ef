"""The one error of loading a model, and what may pass by itself."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Final

from lockstep_runtime.protocol.bus import LoadFailure

# Rights, names and mounts are as a person made them; a network, a full disk or a server that is away may come back.
_LASTING: Final = frozenset(
    {
        errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG,
        errno.EACCES, errno.EPERM, errno.EROFS,
    }
)  # fmt: skip


class ModelError(Exception):
    """The model can't be loaded. The message is a sentence that names the file, tensor or setting to fix.

    `kind`: whether a retry can help; None: the error's cause decides. `retry_after`: seconds in which it can't.
    """

    def __init__(self, message: str, *, kind: LoadFailure | None = None, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after = retry_after


def lasts(error: OSError) -> bool:
    """Whether a person must fix something first: a permission, a file, a mount."""
    return error.errno in _LASTING


def may_pass(error: BaseException) -> bool:
    """Whether reading the model's files again can help though nobody does anything."""
    causes = list(chain(error))
    if told := next((one.kind for one in causes if isinstance(one, ModelError) and one.kind), None):
        return told is LoadFailure.TRANSIENT
    return any(isinstance(one, OSError) and not lasts(one) for one in causes)


def chain(error: BaseException) -> Iterator[BaseException]:
    """It and what caused it, the last first."""
    seen: list[BaseException] = []
    while error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__ or error
