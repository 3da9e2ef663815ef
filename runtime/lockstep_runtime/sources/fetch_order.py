"""What a supervisor hands its fetcher on standard input."""

from __future__ import annotations

import msgspec


class FetchOrder(msgspec.Struct, frozen=True, kw_only=True):
    """`commit`: the group has agreed on; empty: the fetcher resolves the revision. `token`: of the hub, or empty."""

    commit: str = ""
    token: str = ""
