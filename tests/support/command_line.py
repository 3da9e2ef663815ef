"""What the command line makes of words and variables, without doing it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import click
import pytest

from lockstep_runtime.cli import config_from, lockstep
from lockstep_runtime.config import ServeConfig


def options(words: Sequence[str], environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The options of `lockstep …`, by name; raises click's own errors for what is refused."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in [variable for variable in os.environ if variable.startswith("LOCKSTEP_")]:
            patch.delenv(variable)
        for variable, value in (environment or {}).items():
            patch.setenv(variable, value)
        group = click.Context(lockstep, info_name="lockstep")
        name, command, rest = lockstep.resolve_command(group, list(words))
        assert command is not None, words
        return command.make_context(name, rest, parent=group).params


def configuration(words: Sequence[str], environment: Mapping[str, str] | None = None) -> ServeConfig:
    """What `lockstep serve …` is told."""
    return config_from(options(words, environment))
