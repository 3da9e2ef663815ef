"""A request to restart a model's groups one by one (pure).

The documented way is the annotation `lockstep.dev/restartedAt` of the model. `kubectl rollout restart` of one of its
StatefulSets has the same effect: its annotation on that StatefulSet's template counts for all groups. The newest
request is in the template of every group that has followed it, so it holds as long as one of them exists.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from lockstep_operator.groups.group import Group
from lockstep_operator.types.names import KUBECTL_RESTARTED, RESTARTED_ANNOTATION
from lockstep_operator.types.spec import Model
from lockstep_operator.types.timestamps import parse_rfc3339


def with_restart(model: Model, groups: Iterable[Group]) -> Model:
    """The model with the newest request of all."""
    requests = [*_requests(groups), *([] if model.restarted_at is None else [model.restarted_at])]
    return replace(model, restarted_at=max(requests, default=None))


def _requests(groups: Iterable[Group]) -> Iterator[float]:
    for group in groups:
        template = ((group.workload or {}).get("spec") or {}).get("template") or {}
        annotations = (template.get("metadata") or {}).get("annotations") or {}
        for name in (RESTARTED_ANNOTATION, KUBECTL_RESTARTED):
            try:
                yield parse_rfc3339(annotations[name])
            except (KeyError, ValueError, TypeError):
                continue
