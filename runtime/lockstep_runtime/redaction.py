"""Keeps secrets out of a text: those that are known, and what looks like one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Final

MASK: Final = "[secret]"
_WHOLE_WORD_BELOW: Final = 8  # characters: a shorter secret is masked only where it stands by itself
_SECRET_NAME: Final = re.compile(r"TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH|COOKIE", re.IGNORECASE)
_NOT_SECRET: Final = frozenset(
    {
        "LOCKSTEP_API_KEY_FILE",
        "LOCKSTEP_OPERATOR_TOKEN_FILE",
        "HF_TOKEN_PATH",
        "HF_STORED_TOKENS_PATH",
        "TOKENIZERS_PARALLELISM",
    }
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
