"""What is done to a model in its life, each with the wait for its outcome: the tests do it in peace and under fire."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from tests.support.cluster_model import Model, Object
from tests.support.wait import until

CHILDREN: Final = ("statefulsets", "services", "secrets", "serviceaccounts", "networkpolicies", "poddisruptionbudgets")


def change_spec(model: Model, patch: str) -> None:
    """`kubectl patch` with a JSON merge patch."""
    model.kubectl("patch", "tpm", model.name, "--type=merge", "-p", patch)


def scale(model: Model, groups: int) -> None:
    model.kubectl("scale", "tpm", model.name, f"--replicas={groups}")


def until_groups(model: Model, groups: int) -> None:
    """Until so many groups serve, no other has pods or objects left, and the status says the same."""
    model.until_serving(groups)
    size = model.read()["spec"]["tensorParallelSize"]
    expected = {f"{model.name}-{group}" for group in range(groups)}
    model.until("the other groups to be gone", lambda: _names(model, "statefulsets") == expected)
    model.until("the other groups' Services to be gone", lambda: _names(model, "services") == expected | {model.name})
    model.until("their pods to be gone", lambda: len(model.children("pods")) == size * groups)
    status = model.status()
    assert (status["replicas"], status["readyReplicas"]) == (groups, groups)
    # An operator that has just begun knows that pods are Ready before it has heard their groups.
    model.until("all ranks in the status", lambda: model.status()["ranks"] == f"{size * groups}/{size * groups}")


def until_rolled_out(model: Model, before: set[str]) -> None:
    """Until no pod whose UID is in `before` is left and the model is Ready in its new form."""
    model.until("all pods to be new", lambda: bool(model.pods()) and not before & uids(model), 240)
    model.until_serving(int(model.read()["spec"].get("replicas", 1)))


def uids(model: Model) -> set[str]:
    return {str(pod["metadata"]["uid"]) for pod in model.children("pods")}


def _names(model: Model, plural: str) -> set[str]:
    return {str(item["metadata"]["name"]) for item in model.children(plural)}


# --- drift -----------------------------------------------------------------------------------------------------------

Damage = Callable[[Model], None]


def deleted(kind: str, suffix: str) -> Damage:
    def damage(model: Model) -> None:
        model.kubectl("delete", kind, f"{model.name}{suffix}", "--wait=false")

    return damage


def patched(kind: str, suffix: str, patch: str) -> Damage:
    def damage(model: Model) -> None:
        model.kubectl("patch", kind, f"{model.name}{suffix}", "--type=merge", "-p", patch)

    return damage


# Somebody deletes or edits a child. Name -> what they do.
DAMAGES: Final[dict[str, Damage]] = {
    "serving Service deleted": deleted("service", ""),
    "headless Service deleted": deleted("service", "-0"),
    "ServiceAccount deleted": deleted("serviceaccount", "-ranks"),
    "NetworkPolicy deleted": deleted("networkpolicy", "-0"),
    "serving Service leads elsewhere": patched("service", "", '{"spec": {"selector": {"app": "other"}}}'),
    "Service without its label": patched("service", "", '{"metadata": {"labels": {"lockstep.dev/model": null}}}'),
    "StatefulSet scaled": patched("statefulset", "-0", '{"spec": {"replicas": 1}}'),
    "NetworkPolicy opened": patched("networkpolicy", "-0", '{"spec": {"ingress": [{}]}}'),
    "StatefulSet's waits and claims edited": patched(
        "statefulset",
        "-0",
        '{"spec": {"minReadySeconds": 600, "persistentVolumeClaimRetentionPolicy": {"whenDeleted": "Delete"}}}',
    ),
    "StatefulSet's template edited": patched(
        "statefulset", "-0", '{"spec": {"template": {"spec": {"terminationGracePeriodSeconds": 1}}}}'
    ),
}


def shape(model: Model) -> dict[str, Any]:
    """What the operator means the children to be: their specs without what the API server and controllers add."""
    return {
        f"{plural}/{child['metadata']['name']}": _essence(child)
        for plural in CHILDREN
        for child in model.children(plural)
        if child["metadata"].get("deletionTimestamp") is None
    }


def _essence(child: Object) -> Object:
    spec = {
        name: value for name, value in child.get("spec", {}).items() if not name.startswith(("clusterIP", "revision"))
    }
    owners = [owner["uid"] for owner in child["metadata"].get("ownerReferences", [])]
    return {"spec": spec, "labels": child["metadata"]["labels"], "owners": owners, "data": child.get("data")}


def until_shape(model: Model, wanted: dict[str, Any]) -> None:
    def explain() -> str:
        now = shape(model)
        wrong = [name for name in wanted.keys() | now.keys() if wanted.get(name) != now.get(name)]
        return "\n".join(f"{name}: {now.get(name)} instead of {wanted.get(name)}" for name in wrong)

    until("the children to be as they were", lambda: shape(model) == wanted, 90, explain)
