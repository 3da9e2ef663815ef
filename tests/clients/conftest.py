"""Served models for the clients, of two ranks in float32. They only ask; nothing disturbs them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any, Final

import pytest
from tests.clients.conversation import AT_ONCE, SCRIPTS
from tests.support.scripted_model import write_scripted_model
from tests.support.serve import Served, served

ARGUMENTS = ("--tensor-parallel-size", "2", "--dtype", "float32", "--threads-per-rank", "1")

TELEMETRY: Final = {
    "OPENAI_AGENTS_DISABLE_TRACING": "1", "LANGSMITH_TRACING": "false", "LANGCHAIN_TRACING_V2": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip
_guarded = [False]


@pytest.fixture(scope="session", autouse=True)
def stay_at_home() -> Iterator[None]:
    """Whatever a client would send anywhere else is an error."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in TELEMETRY.items():
            patch.setenv(name, value)
        sys.addaudithook(_refuse_others)
        _guarded[0] = True
        yield
        _guarded[0] = False


def _refuse_others(event: str, arguments: tuple[Any, ...]) -> None:
    address = arguments[1] if event == "socket.connect" and _guarded[0] else None
    if isinstance(address, tuple) and not ip_address(address[0]).is_loopback:
        raise RuntimeError(f"a connection to {address[0]}")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """examples/tiny-chat."""
    with served(tmp_path_factory.mktemp("clients"), *ARGUMENTS) as serve:
        serve.ready()
        yield serve


@pytest.fixture(scope="session")
def assistant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A model that calls tools when it is asked about the weather, and makes a sentence of what they return. It takes
    few requests at once."""
    directory = tmp_path_factory.mktemp("assistant")
    model = write_scripted_model(directory / "assistant", SCRIPTS)
    few = ("--max-sequences", str(AT_ONCE), "--max-waiting", "1")
    with served(directory, *ARGUMENTS, *few, model=model) as serve:
        serve.ready()
        yield serve
