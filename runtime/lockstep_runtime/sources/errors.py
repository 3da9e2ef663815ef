"""The one error of loading a model."""

from __future__ import annotations

from lockstep_runtime.protocol.bus import LoadFailure


class ModelError(Exception):
    """The model can't be loaded. The message is a sentence that names the file, tensor or setting to mend.

    `kind` says whether loading again can help; None: that is told by what caused the error. `retry_after` is for how
    many seconds it can't, whatever the cause.
    """

    def __init__(self, message: str, *, kind: LoadFailure | None = None, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after = retry_after
