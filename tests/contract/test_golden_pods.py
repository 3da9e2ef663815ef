"""A change of what the operator renders is made on purpose: each makes every model outdated after an upgrade."""

from __future__ import annotations

import pytest
from tests.support.golden_pods import FOLDER, SPECS, pod


@pytest.mark.parametrize("name", SPECS)
def test_pods_are_rendered_as_before(name: str) -> None:
    again = (
        "if that is meant: `python -m tests.support.golden_pods` writes the files anew; CHANGELOG.md says what changes"
    )
    assert pod(name) == (FOLDER / f"{name}.json").read_text(), again


def test_every_file_is_of_a_model() -> None:
    assert {file.stem for file in FOLDER.glob("*.json")} == set(SPECS)
