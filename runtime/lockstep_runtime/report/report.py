"""The document of `lockstep report`: sections of facts, without secrets and bounded in size."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec

from lockstep_runtime.redaction import Redact
from lockstep_runtime.report import group, log_lines, machine
from lockstep_runtime.report.group import GroupFacts

MAX_SECTION: Final = 64 << 10  # characters
_CUT: Final = "\n[the rest is left out: the section is longer than {} characters]"


def write(
    facts: GroupFacts, environment: Mapping[str, str], redact: Redact, *, log: Iterable[str] | None = None, now: float
) -> str:
    """The report as text. `log`: lines of the group's log; `now`: unix seconds."""
    sections = {
        "Versions": _pairs(machine.versions()),
        "Machine": _pairs(machine.machine()),
        "Variables": _pairs(machine.variables(environment, redact)),
        "Configuration": _document(facts.config, redact),
        "Faults": group.trail(facts.status.faults, redact) if facts.status else ["unknown"],
        "Status": _document(facts.status and msgspec.structs.replace(facts.status, faults=[]), redact),
        "Log": ["not given; --log FILE adds the lines about faults"] if log is None else log_lines.select(log, redact),
    }
    head = "\n".join([f"lockstep report, {group.rfc3339(now)}", *facts.problems])
    body = "".join(f"\n== {name}\n{_bounded(redact(_joined(lines)))}\n" for name, lines in sections.items())
    return f"{_bounded(redact(head))}\n{body}"


def _pairs(facts: Mapping[str, str]) -> list[str]:
    return [f"{name}: {value}" for name, value in facts.items()]


def _document(document: msgspec.Struct | None, redact: Redact) -> list[str]:
    """As JSON. Its strings are redacted before they are written: JSON would write some characters of a secret in
    another way."""
    if document is None:
        return ["unknown"]
    return [json.dumps(_redacted(msgspec.to_builtins(document), redact), indent=1, ensure_ascii=False)]


def _redacted(value: object, redact: Redact) -> object:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redact(str(key)): _redacted(item, redact) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_redacted(item, redact) for item in value]
    return value


def _joined(lines: Sequence[str]) -> str:
    return "\n".join(lines) or "nothing"


def _bounded(text: str) -> str:
    return text if len(text) <= MAX_SECTION else text[:MAX_SECTION] + _CUT.format(MAX_SECTION)
