"""Resource requests of the operator's own (pure).

They are a guess: they yield to the user's limits, which Kubernetes uses where no request is set, and to the namespace's
LimitRanges, which would otherwise reject the pods. What the user sets is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lockstep_operator.types.limits import Limits, number
from lockstep_operator.types.quantity import quantity


def fitted(resources: Mapping[str, Any], ours: Iterable[str], limits: Limits) -> dict[str, Any]:
    """`resources` of a container, with the requests named in `ours` as large as its own limits, and no larger than the
    namespace's."""
    own_limits, requests = resources.get("limits") or {}, dict(resources.get("requests") or {})
    for name in ours:
        if name not in requests:
            continue
        own = own_limits.get(name)
        known = quantity(own) is not None
        asked = [own] if known else [requests[name], limits.default.get(name)]
        requests[name] = _smaller([*asked, limits.most.get(name)])
        least = limits.least.get(name)
        if least is not None and number(least) > number(requests[name]):
            requests[name] = least
    return {**resources, **({"requests": requests} if requests else {})}


def _smaller(values: Iterable[Any]) -> Any:
    return min((value for value in values if value is not None), key=number)
