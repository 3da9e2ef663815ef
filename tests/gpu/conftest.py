"""Everything here needs a CUDA GPU, and is skipped with the reason where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.gpu import why_not

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mine = [item for item in items if HERE in item.path.parents]
    if mine and (reason := why_not()):
        for item in mine:
            item.add_marker(pytest.mark.skip(reason=reason))
