"""Ports for servers that a test starts."""

from __future__ import annotations

import contextlib
import random
import socket


def free_port() -> int:
    """Below those that the kernel gives to connections (32768 and up): no connection takes it before its owner does."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):  # somebody listens there
            probe.bind(("", port))
            return port
