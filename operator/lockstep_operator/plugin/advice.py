"""What to do about a reason or a fault: the sentences of docs/troubleshooting.md, which the wheel carries."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

_PACKAGED: Final = Path(__file__).with_name("troubleshooting.md")
_SOURCE: Final = Path(__file__).parents[3] / "docs" / "troubleshooting.md"
_ROW: Final = re.compile(r"^\| `(\w+)` \| (.+) \| (.+) \|$", re.MULTILINE)
_LINK: Final = re.compile(r"\[([^\]]+)\]\(([^)]+)\)")


def advice(reason: str) -> str:
    """As plain text; empty when nothing is written about it."""
    return _table().get(reason, "")


@functools.cache
def _table() -> Mapping[str, str]:
    text = (_PACKAGED if _PACKAGED.exists() else _SOURCE).read_text()
    return {reason: _LINK.sub(_named, todo).replace("`", "") for reason, _, todo in _ROW.findall(text)}


def _named(link: re.Match[str]) -> str:
    """Where to read on."""
    text, target = link.groups()
    return f"{text} (docs/{'troubleshooting.md' if target.startswith('#') else ''}{target})"
