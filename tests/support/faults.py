"""Faults on purpose, for tests: asks a served group that allows them for one."""

from __future__ import annotations

from typing import Any

from tests.support.serve import TOKEN, Served

from lockstep_runtime.chaos import client
from lockstep_runtime.protocol.chaos import Inject, Injection


def inject(serve: Served, kind: Injection, rank: int, **more: Any) -> None:
    """Ask for the fault; `more` are the other fields of `Inject`."""
    problem = client.send(serve.status_url, TOKEN, Inject(rank=rank, kind=kind, **more))
    assert not problem, problem
