"""The verbs that the operator uses, and no others. The chart's role is compared with this table in a test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Permission:
    """One rule of a Role or ClusterRole."""

    group: str  # of the API; "" is the core group
    resource: str  # with its subresource, if any
    verbs: tuple[str, ...]
    why: str


PERMISSIONS: Final = (
    Permission("lockstep.dev", "tensorparallelmodels", ("get", "list", "watch"), "what is asked for"),
    Permission("lockstep.dev", "tensorparallelmodels/status", ("patch",), "what is so"),
    # A server-side apply that creates needs both verbs.
    Permission("apps", "statefulsets", ("get", "list", "watch", "create", "patch", "delete"), "one per group"),
    Permission(
        "apps", "controllerrevisions", ("list", "watch", "create", "patch", "delete"), "what pods are made from"
    ),
    Permission("", "services", ("get", "list", "watch", "create", "patch", "delete"), "one to serve, one per group"),
    Permission("", "serviceaccounts", ("get", "list", "watch", "create", "patch"), "one without credentials"),
    Permission(
        "networking.k8s.io", "networkpolicies", ("get", "list", "watch", "create", "patch", "delete"), "one per group"
    ),
    Permission(
        "policy",
        "poddisruptionbudgets",
        ("list", "watch", "create", "patch", "delete"),
        "one per model, unless there is another",
    ),
    Permission("", "secrets", ("create", "delete"), "models' tokens, which are never read"),
    Permission("", "pods", ("list", "watch", "delete"), "who is Ready; replaced in a rollout"),
    Permission("", "nodes", ("list", "watch"), "which are cordoned: groups leave them"),
    Permission("", "events", ("list", "create"), "why a pod can't start; what happened"),
    Permission("", "limitranges", ("list",), "requests that the namespace allows"),
)

# In the operator's own namespace, and of its own Lease (a `create` can't be bound by name).
LEASE_PERMISSION: Final = Permission(
    "coordination.k8s.io", "leases", ("get", "create", "update"), "which of two operators works"
)
# There, too, and read of its own alone.
KEY_PERMISSION: Final = Permission("", "secrets", ("get", "create"), "the key that models' tokens follow from")
NODE_PERMISSIONS: Final = (  # with --node-conditions alone
    Permission("", "nodes", ("list",), "which are suspect, when an operator starts"),
    Permission("", "nodes/status", ("patch",), "the condition LockstepSuspect"),
)
