"""The matrix of faults: whatever befalls a rank, whenever, the requests in flight end as if nothing had been.

`make chaos` runs all of it, `make test` a fixed third.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.support.chaos import Arena, Cell, cells, is_in_third, survive


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, id=cell.name, marks=[pytest.mark.third] if is_in_third(cell) else [])
        for cell in sorted(cells(), key=lambda cell: cell.size)
    ],
)
def test_requests_in_flight_outlive(cell: Cell, arena: Callable[[int], Arena]) -> None:
    survive(arena(cell.size), cell)
