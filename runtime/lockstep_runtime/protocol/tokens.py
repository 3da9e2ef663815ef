"""A token per purpose, derived from another: what is overheard on one way opens no other.

Pods hold the group's token and never send it, nor does the operator send the one that it shares with a model's pods.
From a purpose's token neither its origin nor another purpose's can be computed (HMAC-SHA-256).
"""

from __future__ import annotations

import enum
import hmac


class Purpose(enum.StrEnum):
    """What a token is good for."""

    BUS = "bus"  # to take part in a group
    STATUS = "status"  # to read `/status` and `/config`
    FENCE = "fence"  # to fence a group and to free it
    FAULTS = "faults"  # to break ranks on purpose, where that is allowed


def purpose_token(token: str, purpose: Purpose) -> str:
    """What to send, in hexadecimal digits."""
    return hmac.digest(token.encode(), f"lockstep {purpose}".encode(), "sha256").hex()


def entitles(given: str, token: str, purpose: Purpose) -> bool:
    """Whether it is the purpose's token, or the token itself, which whoever is inside a pod may send. Comparing tells
    nothing by its time."""
    accepted = (purpose_token(token, purpose), token)
    return any(hmac.compare_digest(given.encode(), one.encode()) for one in accepted)
