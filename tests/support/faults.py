"""Faults on purpose, for tests: asks a served group that allows them for one."""

from __future__ import annotations

from typing import Any

from tests.support.serve import TOKEN, Served

from lockstep_runtime import inject_client, wire


def inject(serve: Served, kind: wire.Injection, rank: int, **more: Any) -> None:
    """Ask for the fault; `more` are the other fields of `wire.Inject`."""
    problem = inject_client.send(serve.status_url, TOKEN, wire.Inject(rank=rank, kind=kind, **more))
    assert not problem, problem
