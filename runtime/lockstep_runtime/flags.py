"""What the command line's flags are made of: kinds of values, variables, and headings in the help."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any, Final

import click

_UNITS: Final = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
                 "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}  # fmt: skip
_WHOLE: Final = re.compile(r"\d+")
_DECIMAL: Final = re.compile(r"\d+(\.\d+)?")


def byte_size(text: str) -> int:
    """`2Gi`, `512Mi`, `1.5G` or a plain number, in bytes: the quantities that the CRD takes for memory.

    Raises:
        click.BadParameter: it is none of these.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMGT]|[KMGT]i)?", text.strip())
    if not match or not (size := int(float(match[1]) * _UNITS[match[2] or ""])):
        raise click.BadParameter(f"{text!r} is not a size; write it like 2Gi, 512Mi or 1500000000")
    return size


def switch(text: str) -> bool:
    """
    Raises:
        click.BadParameter: it is none of true, false, 1 and 0.
    """
    if text.lower() not in ("true", "false", "1", "0"):
        raise click.BadParameter(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1")


class Number(click.ParamType[float]):
    """A number written with digits alone; click's own ranges also take nan, which is below no limit."""

    def __init__(self, name: str, what: str, accepts: Callable[[float], object], *, whole: bool = False) -> None:
        self.name, self._what, self._accepts, self._whole = name, what, accepts, whole

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if not isinstance(value, str):  # a default
            return float(value) if not self._whole else int(value)
        if not (_WHOLE if self._whole else _DECIMAL).fullmatch(value) or not self._accepts(float(value)):
            self.fail(f"{value!r} is not {self._what}", param, ctx)
        return int(value) if self._whole else float(value)


COUNT: Final = Number("n", "a whole number above 0", lambda number: number > 0, whole=True)
TOKENS: Final = Number("tokens", "a whole number above 0", lambda number: number > 0, whole=True)
INDEX: Final = Number("n", "a whole number", lambda number: number >= 0, whole=True)
PORT: Final = Number("port", "a port between 1 and 65535", lambda number: 0 < number < 65536, whole=True)
SECONDS: Final = Number("seconds", "a number of seconds", lambda number: number >= 0)
SOME_SECONDS: Final = Number("seconds", "a number of seconds above 0", lambda number: number > 0)
FACTOR: Final = Number("factor", "a number of 1 or more", lambda number: number >= 1)


class Flag(click.Option):
    """An option under a heading of its command's help. Its variable counts where it is empty, too."""

    def __init__(self, *names: Any, heading: str, **settings: Any) -> None:
        super().__init__(*names, **settings)
        self.heading = heading

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        return os.environ.get(str(self.envvar))


class Command(click.Command):
    """Its help lists the flags under their headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(ctx):
            if isinstance(option, click.Option) and (record := option.get_help_record(ctx)):
                sections.setdefault(getattr(option, "heading", "help"), []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def flag(heading: str, name: str, kind: Any, default: Any, text: str, field: str = "", **more: Any) -> Any:
    """One option; `field` is what it sets where that has another name than the flag. `name` may be `a/--no-a`."""
    plain = name.partition("/")[0].replace("-", "_")
    settings = {"type": kind, "default": default, "help": text, "show_default": default not in (None, ""), **more}
    variable = f"LOCKSTEP_{plain.upper()}"
    return click.option(f"--{name}", field or plain, cls=Flag, heading=heading, envvar=variable, **settings)
