"""The operator's settings, as it reads them under another environment."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import pytest

from lockstep_operator import settings


def read_settings(arguments: Sequence[str], environment: Mapping[str, str]) -> settings.Settings:
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("LOCKSTEP_")]:
            patch.delenv(name)
        for name, value in environment.items():
            patch.setenv(name, value)
        return settings.read_settings(arguments)
