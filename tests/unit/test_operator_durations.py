"""A duration is what the CRD's pattern lets through, no more and no less."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from tests.support.chart import CRD_SOURCE

from lockstep_operator.types.durations import duration


def patterns(schema: Any) -> set[str]:
    """Of all fields that end in a unit of time."""
    if isinstance(schema, list):
        return {found for item in schema for found in patterns(item)}
    if not isinstance(schema, dict):
        return set()
    own = {schema["pattern"]} if "ms|s|m|h" in str(schema.get("pattern")) else set()
    return own | {found for item in schema.values() for found in patterns(item)}


@functools.cache
def pattern() -> str:
    (found,) = patterns(yaml.safe_load(CRD_SOURCE.read_text()))
    return found.removeprefix("^").removesuffix("$")


def is_duration(text: str) -> bool:
    try:
        duration(text)
    except ValueError:
        return False
    return True


@given(st.text("0123456789.mshd+-w y", max_size=8))
@example("1d")
@example("1h and 2m")
@example("-5s")
@example("1.s")
@example("1m30s")
@example("500ms")
@example("1h\n")
def test_the_accepted_texts_are_the_crds(text: str) -> None:
    assert is_duration(text) == (re.fullmatch(pattern(), text) is not None)


@pytest.mark.parametrize(("text", "seconds"), [("120s", 120.0), ("1m30s", 90.0), ("500ms", 0.5), ("1.5h", 5400.0)])
def test_durations_in_seconds(text: str, seconds: float) -> None:
    assert duration(text) == seconds
