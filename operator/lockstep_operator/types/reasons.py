"""The conditions of a model and the reasons of conditions and Events, one word each, as docs/troubleshooting.md has
them."""

from __future__ import annotations

import enum


class ConditionType(enum.StrEnum):
    READY = "Ready"
    AVAILABLE = "Available"
    MODEL_LOADED = "ModelLoaded"
    COLLECTIVES_HEALTHY = "CollectivesHealthy"
    POISONED = "Poisoned"
    RECONCILING = "Reconciling"
    STALLED = "Stalled"
    DISRUPTIONS_BOUNDED = "DisruptionsBounded"
    EVACUATING = "Evacuating"
    PAUSED = "Paused"


class Reason(enum.StrEnum):
    """The faults' names are reasons, too, of `CollectivesHealthy` and `Poisoned`."""

    # all is well
    READY = "Ready"
    SERVING = "Serving"
    CANARY = "Canary"
    ROLLED_BACK = "RolledBack"
    LOADED = "Loaded"
    JOINED = "Joined"
    NOT_POISONED = "NotPoisoned"
    NOT_STALLED = "NotStalled"
    SETTLED = "Settled"
    # under way
    STARTING = "Starting"
    LOADING = "Loading"
    ROLLING_OUT = "RollingOut"
    SCALING_DOWN = "ScalingDown"
    SCALED_TO_ZERO = "ScaledToZero"
    DRAINING = "Draining"
    RECOVERING = "Recovering"
    NOT_JOINED = "NotJoined"
    NO_GROUP_READY = "NoGroupReady"
    # by a person's wish
    PAUSED = "Paused"
    GROUPS_FENCED = "GroupsFenced"
    # pods leave their nodes
    EVACUATING = "Evacuating"
    NO_STAND_IN = "NoStandIn"
    # pods may be evicted
    ONE_GROUP_AT_A_TIME = "OneGroupAtATime"
    OTHER_BUDGET = "OtherBudget"
    NO_BUDGET = "NoBudget"
    # a group can't serve
    MODEL_LOAD_FAILED = "ModelLoadFailed"
    LOAD_FAILED = "LoadFailed"
    POISONED = "Poisoned"
    RECOVERY_EXHAUSTED = "RecoveryExhausted"
    UNREACHABLE = "Unreachable"
    PROGRESS_DEADLINE_EXCEEDED = "ProgressDeadlineExceeded"
    STALLED = "Stalled"
    # its pods can't run
    UNSCHEDULABLE = "Unschedulable"
    SCHEDULING_GATED = "SchedulingGated"
    PODS_REFUSED = "PodsRefused"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    CONTAINER_REFUSED = "ContainerRefused"
    MOUNT_FAILED = "MountFailed"
    POD_PENDING = "PodPending"
    POD_FAILED = "PodFailed"
    POD_STUCK = "PodStuck"
    NODE_LOST = "NodeLost"
    CRASH_LOOP = "CrashLoop"
    OUT_OF_MEMORY = "OutOfMemory"
    SPAWN_FAILED = "SpawnFailed"
    # the operator can't do what the spec asks
    NAME_CONFLICT = "NameConflict"
    INVALID_SPEC = "InvalidSpec"
    REFUSED = "Refused"
    RETRYING = "Retrying"
    OPERATOR_ERROR = "OperatorError"


class EventReason(enum.StrEnum):
    """Of Events that no condition, fault or rung gives its name."""

    CREATED = "Created"
    READY = "Ready"
    NOT_READY = "NotReady"
    ROLLING_OUT = "RollingOut"
    RECOVERED = "Recovered"
    POD_LOST = "PodLost"
    DRIFT_REPAIRED = "DriftRepaired"
    TOKENS_MADE = "TokensMade"
    DEPRECATED = "Deprecated"
