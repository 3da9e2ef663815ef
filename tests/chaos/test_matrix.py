"""The matrix of faults: whatever befalls a rank, whenever, the requests in flight end as if nothing had been.

`make chaos` runs all of it, `make test` a fixed third.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.support.chaos import Arena, Cell, as_parameters, cells, is_in_third, survive


@pytest.mark.parametrize("cell", as_parameters(sorted(cells(), key=lambda cell: cell.size), is_in_third))
def test_requests_in_flight_outlive(cell: Cell, arena: Callable[[int], Arena]) -> None:
    survive(arena(cell.size), cell)
