"""Whether loading again can help, by what the load raised and what caused it; the leader and the ranks agree."""

from __future__ import annotations

import pytest

from lockstep_runtime.protocol.bus import LoadFailure
from lockstep_runtime.sources.errors import ModelError, may_pass
from lockstep_runtime.worker.fault_classifier import load_failure


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ModelError("config.json names no architecture"), LoadFailure.PERMANENT),
        (AttributeError("'_OpNamespace' 'mkldnn' object has no attribute 'pack'"), LoadFailure.PERMANENT),
        (NotImplementedError("Could not run 'aten::q'"), LoadFailure.PERMANENT),
        (TypeError("unexpected keyword"), LoadFailure.PERMANENT),
        (caused(ModelError("no such file"), FileNotFoundError(2, "No such file")), LoadFailure.PERMANENT),
        (caused(ModelError("the hub can't be reached"), ConnectionResetError(104, "reset")), LoadFailure.TRANSIENT),
        (caused(ModelError("may not read it"), PermissionError(13, "Permission denied")), LoadFailure.PERMANENT),
        (caused(ModelError("may not enter it"), PermissionError(1, "Operation not permitted")), LoadFailure.PERMANENT),
        (PermissionError(13, "Permission denied"), LoadFailure.PERMANENT),
        (OSError(30, "Read-only file system"), LoadFailure.PERMANENT),
        (OSError(40, "Too many levels of symbolic links"), LoadFailure.PERMANENT),
        (caused(ModelError("can't be read"), OSError(5, "Input/output error")), LoadFailure.TRANSIENT),
        (caused(ModelError("can't be read"), OSError(116, "Stale file handle")), LoadFailure.TRANSIENT),
        (TimeoutError("timed out"), LoadFailure.TRANSIENT),
        (caused(ModelError("away", kind=LoadFailure.TRANSIENT), PermissionError(13, "")), LoadFailure.TRANSIENT),
        (OSError(28, "No space left on device"), LoadFailure.TRANSIENT),
        (MemoryError(), LoadFailure.TRANSIENT),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), LoadFailure.TRANSIENT),
        (RuntimeError("something that nobody has seen"), LoadFailure.TRANSIENT),
        (RuntimeError("CUDA error: no CUDA-capable device is detected"), LoadFailure.DEVICE_LOST),
        (caused(ModelError("can't load"), RuntimeError("the GPU is lost")), LoadFailure.DEVICE_LOST),
    ],
)
def test_what_a_failed_load_is(error: Exception, kind: LoadFailure) -> None:
    assert load_failure(error) is kind
    if isinstance(error, ModelError | OSError) and kind is not LoadFailure.DEVICE_LOST:  # what the leader may meet, too
        assert may_pass(error) is (kind is LoadFailure.TRANSIENT)
