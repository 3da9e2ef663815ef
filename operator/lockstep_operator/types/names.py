"""Names that the cluster sees: the API group, labels, annotations, and what a model's children are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

GROUP: Final = "lockstep.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"
KIND: Final = "TensorParallelModel"
PLURAL: Final = "tensorparallelmodels"

FIELD_MANAGER: Final = "lockstep-operator"
STATUS_MANAGER: Final = "lockstep-operator-status"
REPORTER: Final = "lockstep.dev/operator"  # of Events

MODEL_LABEL: Final = "lockstep.dev/model"
GROUP_LABEL: Final = "lockstep.dev/group"
REVISION_LABEL: Final = "lockstep.dev/revision"
INSTANCE_LABEL: Final = "app.kubernetes.io/instance"
POD_INDEX_LABEL: Final = "apps.kubernetes.io/pod-index"  # set by the StatefulSet controller, Kubernetes 1.28 and later
APPLIED_ANNOTATION: Final = "lockstep.dev/applied"  # hash of what was applied: it shows when a field was removed
TEMPLATE_LABEL: Final = "lockstep.dev/template"  # of a ControllerRevision that keeps what a model's pods are made from
SHAPE_ANNOTATION: Final = "lockstep.dev/shape"  # hash of what the spec said of its pods then
ADMITTED_ANNOTATION: Final = "lockstep.dev/admitted"  # hash of what a queue admitted: it can't be changed in place

RESTARTED_ANNOTATION: Final = "lockstep.dev/restartedAt"  # of a model or a pod: restarts the groups in turn
RESOLVE_ANNOTATION: Final = "lockstep.dev/resolveRevisionAt"  # the same: also asks the hub what the revision is now
PAUSED_ANNOTATION: Final = "lockstep.dev/paused"  # of a model: nothing is done about it but reports
EVACUATE_ANNOTATION: Final = "lockstep.dev/evacuate"  # of a pod: it leaves its node, when another group stands in
FENCED_ANNOTATION: Final = "lockstep.dev/fenced-groups"  # of a model: groups that are left alone and take no requests
NEW_TOKENS_ANNOTATION: Final = "lockstep.dev/newTokensAt"  # the same: the pods that follow have new tokens
UPDATE_ANNOTATION: Final = "lockstep.dev/update-runtime"  # of a model: pods as the operator renders them today
ROLLBACK_ANNOTATION: Final = "lockstep.dev/rollback-to"  # of a model: a revision whose pods it is to have again
KUBECTL_RESTARTED: Final = "kubectl.kubernetes.io/restartedAt"  # by `kubectl rollout restart` of a StatefulSet

# Of others, which a model's StatefulSets need to be understood by them.
QUEUE_LABEL: Final = "kueue.x-k8s.io/queue-name"  # of a model or a StatefulSet: its pods wait for room in that queue
QUEUE_PRIORITY_LABEL: Final = "kueue.x-k8s.io/priority-class"
QUEUE_FINALIZER: Final = "kueue.x-k8s.io/managed"  # older Kueue's on pods; it goes when a pod is deleted
VOLCANO: Final = "volcano"  # the scheduler's name
VOLCANO_MINIMUM: Final = "scheduling.volcano.sh/group-min-member"  # pods that are placed together or not at all

APP_LABELS: Final[Mapping[str, str]] = {
    "app.kubernetes.io/name": "lockstep",
    "app.kubernetes.io/component": "model",
    "app.kubernetes.io/managed-by": "lockstep-operator",
}
# By which endpoint pickers of inference gateways know whose metrics these are: llm-d's label, and the one before it.
ENGINE_LABELS: Final[Mapping[str, str]] = {
    "llm-d.ai/engine-type": "lockstep",
    "inference.networking.k8s.io/engine-type": "lockstep",
}
OPERATOR_POD_LABELS: Final[Mapping[str, str]] = {
    "app.kubernetes.io/name": "lockstep",
    "app.kubernetes.io/component": "operator",
}

CONTAINER: Final = "lockstep"
TOKEN_KEY: Final = "token"  # noqa: S105 - the name of a key
OPERATOR_TOKEN_VOLUME: Final = "operator-token"  # noqa: S105 - the name of a volume


@dataclass(frozen=True, slots=True, order=True)
class ModelKey:
    """Which model. Its identity is its UID; this is how it is looked up and queued."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


def group_name(model: str, group: int | str) -> str:
    """Of the group's StatefulSet, headless Service and NetworkPolicy."""
    return f"{model}-{group}"


def template_name(model: str, revision: str) -> str:
    """Of the ControllerRevision that keeps what pods of this revision are made from."""
    return f"{model}-{revision}"


def group_token_name(model: str, tokens: str) -> str:
    """Of the Secret that a group's pods know each other by. `tokens` is the model's `tokens_id`: the name is nobody
    else's, so whatever has it is the model's own."""
    return f"{model}-token-{tokens}"


def operator_token_name(model: str, tokens: str) -> str:
    """Of the Secret that the pods know the operator by."""
    return f"{model}-operator-{tokens}"


def account_name(model: str) -> str:
    return f"{model}-ranks"


def selector(model: str) -> str:
    """Label selector of everything that belongs to the model."""
    return f"{MODEL_LABEL}={model}"


def label_of(kind: str) -> str:
    """That objects of a model have, with its name as value. StatefulSets make ControllerRevisions, too, which have the
    labels of their pods."""
    return TEMPLATE_LABEL if kind == "ControllerRevision" else MODEL_LABEL


def key_of_child(child: Mapping[str, Any]) -> ModelKey | None:
    """The model that an object's labels name."""
    metadata = child.get("metadata") or {}
    model = (metadata.get("labels") or {}).get(MODEL_LABEL)
    return ModelKey(metadata.get("namespace", ""), model) if model else None
