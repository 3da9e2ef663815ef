"""Whether loading again can help, by what the load raised and what caused it."""

from __future__ import annotations

import pytest

from lockstep_runtime.protocol.bus import LoadFailure
from lockstep_runtime.sources.errors import ModelError
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
