"""`kubectl port-forward`, as somebody uses it who may do no more than that."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.support import kubectl
from tests.support.wait import until

SECONDS = 60.0


@contextmanager
def forwarding(namespace: str, target: Callable[[], str], local: int, remote: int) -> Iterator[str]:
    """The address of this machine from which the target (such as pod/…) is reached; it may be another with each try."""
    with _listening(namespace, target, f"{local}:{remote}"):
        yield f"http://127.0.0.1:{local}"


@contextmanager
def _listening(namespace: str, target: Callable[[], str], ports: str) -> Iterator[None]:
    process: subprocess.Popen[str] | None = None

    def look() -> bool:
        """kubectl ends when there is no pod to forward to yet."""
        nonlocal process
        process = subprocess.Popen(
            kubectl.command("-n", namespace, "port-forward", target(), ports), text=True, stdout=-1
        )
        assert process.stdout is not None
        if process.stdout.readline().startswith("Forwarding from"):
            return True
        _end(process)
        return False

    until("kubectl to forward a port", look, SECONDS)
    try:
        yield
    finally:
        if process is not None:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
