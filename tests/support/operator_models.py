"""Models, groups and pods as the operator sees them, for tests of its pure modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lockstep_operator.decisions import manifests
from lockstep_operator.decisions.planner import Decision
from lockstep_operator.decisions.pod_template import rendered
from lockstep_operator.decisions.rollout import plan
from lockstep_operator.groups.facts import facts_of
from lockstep_operator.groups.group import Group
from lockstep_operator.reporting.conditions import Obstacle
from lockstep_operator.reporting.transition import Transition, transition
from lockstep_operator.settings import Settings
from lockstep_operator.types.model_source import HostPath
from lockstep_operator.types.model_status import Tokens, parse
from lockstep_operator.types.names import ModelKey
from lockstep_operator.types.observed import Observed, Pod
from lockstep_operator.types.recovery_state import RecoveryState
from lockstep_operator.types.spec import Model

NOW = 1_800_000_000.0
SETTINGS = Settings(runtime_image="runtime:1", operator_namespace="lockstep-system")


def tokens_of(made: Model) -> Tokens:
    """As the status has them once their Secrets are made."""
    return Tokens(key="", id=made.tokens_id, time=NOW - 3600)


def model(**fields: Any) -> Model:
    defaults: dict[str, Any] = {
        "key": ModelKey("team", "chat"), "uid": "uid-m", "generation": 3, "source": HostPath("/models/chat"),
        "served_name": "chat", "tensor_parallel_size": 2,
    }  # fmt: skip
    return Model(**(defaults | fields))


def revision_of(made: Model, settings: Settings = SETTINGS) -> str:
    """Of the pods of a model for which nothing is kept yet."""
    return manifests.revision(made, rendered(made, settings))


def pod(group: int = 0, index: int = 0, revision: str = "new", *, ready: bool = True, **fields: Any) -> Pod:
    defaults: dict[str, Any] = {
        "name": f"chat-{group}-{index}", "uid": f"uid-{group}-{index}", "group": group, "index": index,
        "revision": revision,
        "ready": ready, "created": NOW - 60, "deleting": None, "ip": "10.0.0.1", "owner_uid": f"uid-{group}",
        "phase": "Running", "raw": {"metadata": {}, "spec": {}, "status": {}},
    }  # fmt: skip
    return Pod(**(defaults | fields))


def group(
    index: int = 0, revision: str = "new", *, ready: bool = True, pods: str | None = None, size: int = 2
) -> Group:
    """`revision` of the StatefulSet, `pods` of its pods ("" for none); a group with revision "" doesn't exist."""
    if not revision:
        return Group(index=index, workload=None, pods=())
    workload = {
        "metadata": {
            "uid": f"uid-{index}", "name": f"chat-{index}", "generation": 1,
            "creationTimestamp": "2027-01-15T07:00:00Z",
        },
        "spec": {"replicas": size, "template": {"metadata": {"labels": {"lockstep.dev/revision": revision}}}},
        "status": {"observedGeneration": 1},
    }  # fmt: skip
    of_pods = revision if pods is None else pods
    made = tuple(pod(index, number, of_pods, ready=ready) for number in range(size)) if of_pods else ()
    return Group(index=index, workload=workload, pods=made)


def pass_of(
    made: Model, observed: Observed, *groups: Group, obstacle: Obstacle | None = None, now: float = NOW, **fields: Any
) -> Transition:
    """What one pass makes of the status; `fields` are of its decision."""
    facts = tuple(facts_of(one, observed, made, now) for one in groups)
    defaults: dict[str, Any] = {
        "revision": "new",
        "groups": facts,
        "rollout": plan(groups, fields.get("revision", "new"), 1),
    }
    return transition(made, Decision(**(defaults | fields)), observed.status, obstacle, (), now)


def recovery_of(block: Mapping[str, Any] | None) -> RecoveryState:
    """What `status.groups[].recovery` says."""
    return parse({"groups": [{"group": 0, "recovery": block}]}).group(0).recovery
