"""The group's part of a report: status, faults and configuration, from its supervisor."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, TypeVar

import msgspec

from lockstep_runtime.config import ServeConfig
from lockstep_runtime.protocol.status import FaultRecord, GroupStatus
from lockstep_runtime.protocol.tokens import Purpose, purpose_token
from lockstep_runtime.redaction import Redact

MAX_ANSWER_BYTES: Final = 4 << 20
SECONDS: Final = 10.0  # for each answer
MAX_REFUSAL_BYTES: Final = 4096
MAX_MESSAGE: Final = 2000  # characters

Document = TypeVar("Document", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True)
class GroupFacts:
    """What the supervisor answered; of what it didn't, `problems` has a sentence."""

    status: GroupStatus | None = None
    config: ServeConfig | None = None
    problems: tuple[str, ...] = ()


def ask(url: str, token: str) -> GroupFacts:
    """The status (the leader's supervisor alone has it) and the configuration, from the supervisor at this URL."""
    problems: list[str] = []
    status = _fetch(f"{url}/status", token, GroupStatus, problems)
    config = _fetch(f"{url}/config", token, ServeConfig, problems)
    return GroupFacts(status, config, tuple(problems))


def _fetch(url: str, token: str, kind: type[Document], problems: list[str]) -> Document | None:
    try:
        return msgspec.json.decode(_get(url, token), type=kind)
    except urllib.error.HTTPError as error:
        with error:
            said = error.read(MAX_REFUSAL_BYTES).decode(errors="replace").strip()
        hint = "; set LOCKSTEP_TOKEN to the group's token" if error.code == 401 else ""
        problems.append(f"{url} answered {error.code}: {said}{hint}")
    except (OSError, ValueError) as error:  # no connection; no URL, not HTTP, no JSON, or another's
        problems.append(f"nothing from {url}: {error}")
    return None


def _get(url: str, token: str) -> bytes:
    headers = {"Authorization": f"Bearer {purpose_token(token, Purpose.STATUS)}"}
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - the user's own
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:  # noqa: S310
        body: bytes = answer.read(MAX_ANSWER_BYTES + 1)
    if len(body) > MAX_ANSWER_BYTES:
        raise ValueError(f"its answer is longer than {MAX_ANSWER_BYTES} bytes")
    return body


def trail(faults: Sequence[FaultRecord], redact: Redact) -> list[str]:
    """One line for each fault: when, what, who, and what became of it."""
    return [_line(one, redact) for one in faults] or ["no fault since the group's supervisor started"]


def _line(fault: FaultRecord, redact: Redact) -> str:
    who = "no rank named" if fault.rank is None else f"rank {fault.rank}"
    phases = ", ".join(f"{name} {seconds:g} s" for name, seconds in fault.phases.items())
    end = "open" if fault.recovered_at is None else f"recovered {rfc3339(fault.recovered_at)}"
    resumed = f"{fault.requests_resumed} requests resumed"
    head = f"{rfc3339(fault.at)} fault {fault.id} epoch {fault.epoch}: {fault.fault}, {who}, {fault.rung or 'no rung'}"
    return f"{head}, {end}, {resumed} ({phases}): {redact(fault.message)[:MAX_MESSAGE]}"


def rfc3339(seconds: float) -> str:
    """Unix seconds as a time in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
