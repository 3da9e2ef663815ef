"""An operator beside the deployed one that knows the models by the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from tests.support import kubectl
from tests.support.cluster_model import OPERATOR_NAMESPACE

BINDING: Final = "lockstep-of-the-test"


@contextmanager
def shared_key(user: str) -> Iterator[None]:
    """The user may read the deployed operator's key meanwhile. Two keys would undo each other's tokens."""
    there = ("--namespace", OPERATOR_NAMESPACE)
    gone = ("delete", "rolebinding", BINDING, *there, "--ignore-not-found")
    kubectl.kubectl(*gone)
    kubectl.kubectl("create", "rolebinding", BINDING, *there, "--role=lockstep-own", f"--user={user}")
    try:
        yield
    finally:
        kubectl.kubectl(*gone)
