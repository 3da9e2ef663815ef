"""One arena per size of group, shared by all cells of that size."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
from tests.support.chaos import Arena

Arenas = Callable[[int], Arena]


@pytest.fixture(scope="session")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arenas]:
    """The arena for groups of a size; only one has processes at a time."""
    with contextlib.ExitStack() as stack:
        open_arenas: dict[int, Arena] = {}

        def of(size: int) -> Arena:
            for other in [one for one in open_arenas if one != size]:
                open_arenas.pop(other).close()
            if size not in open_arenas:
                open_arenas[size] = Arena(tmp_path_factory.mktemp(f"arena-{size}"), size)
                stack.callback(open_arenas[size].close)
            return open_arenas[size]

        yield of
