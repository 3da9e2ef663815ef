"""Which hub a model is of: one of those that `--source` names, which MODEL names or which is the default. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from lockstep_runtime.config import Source, UsageError

_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_QUALIFIED: Final = re.compile(r"([a-z0-9][a-z0-9-]*):([^/:]+(?:/[^/:]+)?)")
_KEYS: Final[Mapping[str, str]] = {
    "name": "name",
    "endpoint": "endpoint",
    "token-variable": "token_variable",
    "token-file": "token_file",
    "cache": "cache",
}
_FORM: Final = "write it like name=corp,endpoint=https://hub.corp.example,token-variable=CORP_HUB_TOKEN,default"


def parse_source(text: str) -> tuple[Source, bool]:
    """One `--source`, and whether it is the default.

    Raises:
        UsageError: it is malformed.
    """
    fields: dict[str, str | None] = {}
    is_default = False
    for part in text.split(","):
        key, equals, value = part.strip().partition("=")
        if key == "default" and value in ("", "true"):
            is_default = True
        elif key == "token":
            raise UsageError(
                "--source: a token on the command line is everybody's to read: give token-variable or token-file"
            )
        elif key not in _KEYS or not equals or not value or _KEYS[key] in fields:
            raise UsageError(f"--source {part.strip()!r} is not understood: {_FORM}")
        else:
            fields[_KEYS[key]] = value
    name, endpoint = fields.get("name") or "", fields.get("endpoint")
    if not _NAME.fullmatch(name):
        raise UsageError(f"--source needs a name of lower-case letters, digits and '-': {_FORM}")
    if endpoint is not None and not re.match(r"https?://[^/]", endpoint):
        raise UsageError(f"--source {name}: the endpoint {endpoint!r} is no address: {_FORM}")
    if endpoint is None and name != Source().name:
        raise UsageError(f"--source {name} needs an endpoint: {_FORM}")
    variable = fields.pop("token_variable", Source().token_variable if name == Source().name else None)
    return Source(**{**fields, "name": name}, token_variable=variable), is_default  # type: ignore[arg-type] # by _KEYS


def other_variables(chosen: Source, texts: Sequence[str]) -> set[str]:
    """Of the tokens that are not for this model's source."""
    named = {source.token_variable for source, _ in map(parse_source, texts)}
    return {one for one in named if one is not None and one != chosen.token_variable}


def choose(model: str, texts: Sequence[str], *, is_folder: bool) -> tuple[str, Source]:
    """The model's id at its source, and the source. `corp:org/name` names one; `org/name` is of the default.

    Raises:
        UsageError: a source is malformed, given twice or unknown, or there are two defaults.
    """
    sources = {Source().name: Source()}
    default = ""
    for source, is_default in map(parse_source, texts):
        if source.name in sources and (source.name != Source().name or sources[source.name] != Source()):
            raise UsageError(f"--source {source.name} is given twice")
        if is_default and default:
            raise UsageError(f"--source: {default} and {source.name} can't both be the default")
        sources[source.name] = source
        default = source.name if is_default else default
    qualified = _QUALIFIED.fullmatch(model)
    if is_folder or qualified is None:
        return model, sources[default or Source().name]
    if qualified[1] not in sources:
        raise UsageError(f"{model}: there is no source {qualified[1]}; there is {', '.join(sources)} (--source)")
    return qualified[2], sources[qualified[1]]
