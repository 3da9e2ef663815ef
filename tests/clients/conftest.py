"""One served model for the clients: two ranks of examples/tiny-chat in float32. They only ask; nothing disturbs it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.serve import Served, served

ARGUMENTS = ("--tensor-parallel-size", "2", "--dtype", "float32", "--threads-per-rank", "1")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("clients"), *ARGUMENTS) as serve:
        serve.ready()
        yield serve
