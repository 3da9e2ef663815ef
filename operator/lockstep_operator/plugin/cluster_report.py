"""`kubectl lockstep report`: what a fault report needs of the cluster, without secrets; each group's own `lockstep
report` beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import yaml

from lockstep_operator.plugin.status import table
from lockstep_operator.types.observed import Object
from lockstep_runtime.redaction import MASK, Redact, is_secret_name

EVENTS: Final = 60  # the newest


def write(model: Object, pods: Sequence[Object], events: Sequence[Object], redact: Redact) -> str:
    """One document in sections. `redact` masks what looks like a secret; variables with telling names are masked whole,
    and Secrets are never read."""
    metadata = model["metadata"]
    kept = {name: metadata[name] for name in ("name", "namespace", "uid", "generation", "creationTimestamp")}
    spec = yaml.safe_dump(_masked({"metadata": kept, "spec": model["spec"]}), sort_keys=False)
    sections = {
        "model": spec,
        "status": yaml.safe_dump(model.get("status") or {}, sort_keys=False),
        "pods": table([_POD_HEAD, *map(_pod, pods)]),
        "events": "\n".join(_events(events)) or "none",
    }
    return redact("\n".join(f"## {title}\n\n{text.rstrip()}\n" for title, text in sections.items()))


def _masked(value: Any) -> Any:
    """Without the values of variables that are called like secrets."""
    if isinstance(value, Mapping):
        if "value" in value and is_secret_name(str(value.get("name", ""))):
            return {**value, "value": MASK}
        return {name: _masked(item) for name, item in value.items()}
    return [_masked(item) for item in value] if isinstance(value, list) else value


_POD_HEAD: Final = ("POD", "PHASE", "READY", "RESTARTS", "NODE", "IMAGE", "LAST END")


def _pod(pod: Object) -> tuple[str, ...]:
    status = pod.get("status") or {}
    containers = status.get("containerStatuses") or [{}]
    ends = [(one.get("lastState") or {}).get("terminated") or {} for one in containers]
    said = [
        f"{end.get('reason', '')} {end['exitCode']} {end.get('finishedAt', '')}" for end in ends if "exitCode" in end
    ]
    ready = all(one.get("ready") for one in containers)
    return (
        pod["metadata"]["name"],
        status.get("phase", ""),
        str(ready),
        str(sum(one.get("restartCount", 0) for one in containers)),
        (pod.get("spec") or {}).get("nodeName", ""),
        str(containers[0].get("imageID") or containers[0].get("image", "")),
        "; ".join(said),
    )


def _events(events: Sequence[Object]) -> Iterator[str]:
    for one in sorted(events, key=_when)[-EVENTS:]:
        about = one["involvedObject"]
        yield f"{_when(one)} {one.get('type', '')} {about['kind']}/{about['name']} {one['reason']}: {one['message']}"


def _when(event: Object) -> str:
    return str(event.get("lastTimestamp") or event.get("eventTime") or event["metadata"]["creationTimestamp"])
