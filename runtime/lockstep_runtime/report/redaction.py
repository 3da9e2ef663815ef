"""Keeps secrets out of a report: those that this process can read, and what looks like one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

from lockstep_runtime.config import API_KEY_FILE_VARIABLE

MASK: Final = "[secret]"
_WHOLE_WORD_BELOW: Final = 8  # characters: a shorter secret is masked only where it stands by itself
_MAX_FILE_BYTES: Final = 1 << 20
_SECRET_NAME: Final = re.compile(r"TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH|COOKIE", re.IGNORECASE)
_NOT_SECRET: Final = frozenset(
    {API_KEY_FILE_VARIABLE, "HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH", "TOKENIZERS_PARALLELISM"}
)
_PATTERNS: Final = (
    (re.compile(r"\b(?:hf|sk|ghp|github_pat|glpat)[-_][A-Za-z0-9_-]{16,}"), MASK),
    (re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"), MASK),  # JSON Web Token, RFC 7519
    (
        re.compile(r"(?i)\b(bearer|basic)(\s+)[A-Za-z0-9._~+/=-]{16,}"),
        rf"\1\2{MASK}",
    ),  # Authorization, RFC 6750 and 7617
    (re.compile(r"(://)[^/\s@]+@"), rf"\1{MASK}@"),  # user:password@ of a URL
    (re.compile(r"(?i)\b([\w-]*(?:token|api[_-]?key|secret|password))(\s*[=:]\s*)(?!\[)[^\s,;&\"']+"), rf"\1\2{MASK}"),
)

Redact = Callable[[str], str]


def is_secret_name(name: str) -> bool:
    """Whether a variable of this name holds a secret, as far as its name shows."""
    return name not in _NOT_SECRET and _SECRET_NAME.search(name) is not None


def known(environment: Mapping[str, str]) -> set[str]:
    """The secrets that this process can read: in variables, in the files of API keys and of the hub's tokens."""
    values = {value.strip() for name, value in environment.items() if is_secret_name(name)}
    for path in _secret_files(environment):
        try:
            with path.open("rb") as file:
                text = file.read(_MAX_FILE_BYTES).decode(errors="replace")
        except OSError:
            continue
        lines = (line.strip() for line in text.splitlines())
        values |= {part for line in lines for part in (line, line.rpartition("=")[2].strip())}
    return values - {""}


def _secret_files(environment: Mapping[str, str]) -> list[Path]:
    home = Path(environment.get("HF_HOME") or Path(environment.get("HOME", "/")) / ".cache" / "huggingface")
    files = [
        environment.get(API_KEY_FILE_VARIABLE),
        environment.get("HF_TOKEN_PATH") or home / "token",
        environment.get("HF_STORED_TOKENS_PATH") or home / "stored_tokens",
    ]
    return [Path(file) for file in files if file]


def redactor(secrets: Iterable[str]) -> Redact:
    """A function that masks these secrets, and what looks like one, in a text."""
    by_length = sorted(set(secrets), key=len, reverse=True)
    patterns = [
        re.escape(one) if len(one) >= _WHOLE_WORD_BELOW else rf"(?<!\w){re.escape(one)}(?!\w)" for one in by_length
    ]
    exact = re.compile("|".join(patterns)) if patterns else None

    def redact(text: str) -> str:
        if exact is not None:
            text = exact.sub(MASK, text)
        for pattern, replacement in _PATTERNS:
            text = pattern.sub(replacement, text)
        return text

    return redact
