"""Kubernetes quantities, such as 500m, 2Gi or 1e3, as numbers.

The client's `kubernetes.utils.quantity` isn't used: importing it imports all of the client, and what only reads and
decides does without.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Final

_QUANTITY: Final = re.compile(r"^([+-]?(?:\d+\.?\d*|\.\d+))(?:([eE][+-]?\d{1,2})|([EPTGMK]i|[EPTGMkmun]))?$")
_SUFFIXES: Final[Mapping[str, Decimal]] = {
    **{letter + "i": Decimal(1024) ** power for power, letter in enumerate("KMGTPE", start=1)},
    **{letter: Decimal(1000) ** power for power, letter in enumerate("kMGTPE", start=1)},
    "m": Decimal("0.001"),
    "u": Decimal("0.000001"),
    "n": Decimal("0.000000001"),
}


def quantity(text: object) -> Decimal | None:
    """The number that it stands for; None if it isn't one."""
    match = _QUANTITY.match(str(text))
    return Decimal(match[1] + (match[2] or "")) * _SUFFIXES.get(match[3], Decimal(1)) if match else None
