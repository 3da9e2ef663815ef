"""One model's life under local operators of its own, and how it ended, comparable with another model's of its name."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from tests.support.api_proxy import ApiProxy
from tests.support.cluster_lifecycle import shape
from tests.support.cluster_model import Model
from tests.support.local_operator import LocalOperator
from tests.support.wait import until

Object = dict[str, Any]

TOLD_ONCE: Final = ("Created", "RollingOut", "RankLost", "RecycleGroup", "Recovered")
NOTHING_SECONDS: Final = 4.0  # without a write: an operator looks at a model within half a second of its start
QUIET_SECONDS: Final = 40.0
SAME_SECONDS: Final = 60.0


@dataclass(slots=True)
class Life:
    """`operators` all speak through `proxy`. `seen` is how many of its writes belong to earlier scenarios."""

    name: str
    model: Model
    proxy: ApiProxy
    operators: list[LocalOperator] = field(default_factory=list)
    seen: int = 0
    replaced: float = 0.0  # monotonic seconds

    def explain(self) -> str:
        logs = [f"--- operator {number}\n{o.log()[-6000:]}" for number, o in enumerate(self.operators)]
        writes = [f"{asked.meaning}: {asked.body[:2000]!r}" for asked in self.proxy.written[-6:]]
        return "\n".join([f"the {self.name} life", self.model.explain(), *logs, "--- last writes", *writes])

    def until(self, what: str, look: Callable[[], bool], seconds: float) -> None:
        def healthy_look() -> bool:
            self.check_operators()
            return look()

        until(f"{what} in the {self.name} life", healthy_look, seconds, self.explain)

    def check_operators(self) -> None:
        """They were refused nothing for good, and met nothing that they did not expect."""
        for operator in self.operators:
            log = operator.log()
            assert "Traceback" not in log, log
            assert "forbidden: User" not in log, log

    def until_same(self, other: Life) -> None:
        """Until this model's end state is the other's. Both are read anew: the other's may be changing still."""
        last: list[str] = []

        def same() -> bool:
            last[:] = differences(end_state(other.model), end_state(self.model))
            return not last

        def explain() -> str:
            return "\n".join([*last, self.explain()])

        until(f"the {self.name} life to be as the {other.name} one", same, SAME_SECONDS, explain)

    def new_writes(self) -> set[str]:
        """Targets of what was written since the last call. Events tell of what was seen on the way, so they differ."""
        written = [asked.target for asked in self.proxy.written[self.seen :]]
        self.seen += len(written)
        return {target for target in written if "POST events" not in target}

    def replace_operators(self) -> None:
        for operator in self.operators:
            operator.replace()
        self.replaced = time.monotonic()

    def until_quiet(self) -> None:
        """Nothing is written any more, not even by operators that have just started."""

        def calm() -> bool:
            return time.monotonic() - max(self.replaced, self.proxy.last_write) > NOTHING_SECONDS

        self.until("the writes to end", calm, QUIET_SECONDS)


def end_state(model: Model) -> Object:
    """The children and what the status tells, without what differs between any two models of the same name."""
    resource = model.api.find("tensorparallelmodels", model.namespace, model.name)
    if resource is None:
        return {}
    tokens = {kind.upper(): model.secret(kind) or {} for kind in ("token", "operator")}
    text = json.dumps({"children": shape(model), "told": _told(resource.get("status", {})), "pods": _pods(model)})
    own = {
        "NAMESPACE": model.namespace,
        "UID": resource["metadata"]["uid"],
        "REVISION": resource.get("status", {}).get("revision"),
        **{kind: secret.get("data", {}).get("token") for kind, secret in tokens.items()},
        "TOKENS": resource.get("status", {}).get("tokens", {}).get("id"),
    }
    for common, value in own.items():
        text = text.replace(value, common) if value else text
    state: Object = json.loads(text)
    return state


def _pods(model: Model) -> dict[str, str]:
    """Name -> revision."""
    return {
        pod["metadata"]["name"]: pod["metadata"]["labels"]["lockstep.dev/revision"] for pod in model.children("pods")
    }


def _told(status: Object) -> Object:
    recovery, fault = status.get("lastRecovery", {}), status.get("lastFault", {})
    counted = ("replicas", "readyReplicas", "updatedReplicas", "ranks", "recoveries")
    return {
        "conditions": {c["type"]: [c["status"], c["reason"]] for c in status.get("conditions", [])},
        "counted": {name: status.get(name) for name in counted},
        "lastFault": [fault.get(name) for name in ("fault", "group", "rank")],
        "lastRecovery": [recovery.get(name) for name in ("fault", "group", "suspectRank", "rung")],
        "groups": [_group(group) for group in status.get("groups", [])],
    }


def _group(group: Object) -> Object:
    """Of recovery only what was spent: a step is forgotten after a minute of health, which each life has at its own."""
    told = {name: group.get(name) for name in ("group", "ready", "state", "recoveries", "message")}
    return {**told, "spent": group.get("recovery", {}).get("spent")}


def events(model: Model) -> Counter[str]:
    """Reason -> how many Events tell of it, of those that are told once however often an operator dies over it."""
    found = model.api.items("events", model.namespace)
    return Counter(event["reason"] for event in found if event["reason"] in TOLD_ONCE)


def differences(wanted: Any, found: Any, path: str = "") -> list[str]:
    """Where two documents differ, in words."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        names = sorted(wanted.keys() | found.keys())
        return [line for name in names for line in differences(wanted.get(name), found.get(name), f"{path}/{name}")]
    return [] if wanted == found else [f"{path}: {found} instead of {wanted}"]
