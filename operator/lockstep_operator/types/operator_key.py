"""The operator's key, from which the tokens of all models follow: so it needs to read none of their Secrets."""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from typing import Final

KEY_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class OperatorKey:
    """None of what is derived from it tells of it, or of another (HMAC-SHA-256). `uid` is a model's: `tokens`, its
    `tokens_id`, is short, and whoever may annotate a model could look for another's."""

    secret: bytes = field(repr=False)

    @property
    def id(self) -> str:
        """By which it can be told from another key, and which anybody may see."""
        return self._derived("id")[:10]

    def group_token(self, uid: str, tokens: str) -> str:
        """By which a group's pods know each other."""
        return self._derived(f"group {uid} {tokens}")

    def operator_token(self, uid: str, tokens: str) -> str:
        """By which a model's pods know the operator."""
        return self._derived(f"operator {uid} {tokens}")

    def _derived(self, what: str) -> str:
        return hmac.digest(self.secret, f"lockstep {what}".encode(), "sha256").hex()
