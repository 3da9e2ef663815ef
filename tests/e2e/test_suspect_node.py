"""The node condition behind a switch: an operator that has it marks a node whose ranks fail, and takes that back.

The operator under test may do what the chart grants with `nodeConditions` on, and no more; the deployed one, which has
it off, looks after the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from tests.support import kubectl
from tests.support.api_proxy import ApiProxy
from tests.support.chart import render
from tests.support.cluster_api import ClusterApi
from tests.support.cluster_faults import WORKER
from tests.support.cluster_model import OPERATOR_NAMESPACE, Model, Object, tiny_chat
from tests.support.cluster_processes import kill, one_process
from tests.support.local_operator import LocalOperator, deployed_settings, deployed_user
from tests.support.shared_key import shared_key
from tests.support.wait import until

CONDITION: Final = "LockstepSuspect"
ACCOUNTS: Final = ("ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding")
HEALED_SECONDS: Final = 60.0
MARKED_SECONDS: Final = 30.0
LEARNT_SECONDS: Final = 60.0
LONG_AGO: Final = "2020-01-01T00:00:00Z"


def granted(namespace: str, user: str) -> list[Object]:
    """What the chart makes with the switch on, for this user."""
    values = {"watchNamespaces": [namespace], "nodeConditions": True}
    made = [
        one
        for one in render(values)
        if one["metadata"].get("namespace") == namespace or one["metadata"]["name"].endswith("-nodes")
        if one["kind"] in ACCOUNTS
    ]
    for one in made:
        if one["kind"].endswith("Binding"):
            one["subjects"] = [{"kind": "User", "name": user, "apiGroup": "rbac.authorization.k8s.io"}]
    return made


@pytest.fixture
def operator(api: ClusterApi, namespace: str, tmp_path: Path) -> Iterator[LocalOperator]:
    """With the switch, in the test's namespace."""
    user = f"system:serviceaccount:{namespace}:marks-nodes"
    rights = granted(namespace, user)
    assert [one["kind"] for one in rights if one["metadata"].get("namespace") is None] == [
        "ClusterRole",
        "ClusterRoleBinding",
    ]
    kubectl.apply_all(rights)
    proxy = ApiProxy(kubectl.KUBECONFIG, user)
    proxy.start()
    deployment = api.find("deployments", OPERATOR_NAMESPACE, "lockstep")
    assert deployment is not None
    settings = deployed_settings(deployment) | {"LOCKSTEP_NODE_CONDITIONS": "true", "LOCKSTEP_WATCH_NODES": "false"}
    made = LocalOperator(proxy.url, namespace, settings, tmp_path / "operator")
    with shared_key(user):
        made.start()
        yield made
    made.kill()
    proxy.stop()
    for one in rights:
        if one["metadata"].get("namespace") is None:
            kubectl.kubectl("delete", one["kind"], one["metadata"]["name"])


@pytest.fixture
def model(api: ClusterApi, namespace: str, operator: LocalOperator) -> Iterator[Model]:
    made = Model(api, namespace, "unlucky")
    made.apply(tiny_chat())
    made.until_ready()
    yield made
    made.delete()
    node = str(next(iter(api.everywhere("nodes")))["metadata"]["name"])
    gone = {"status": {"conditions": [{"type": CONDITION, "$patch": "delete"}]}}
    kubectl.kubectl("patch", "node", node, "--subresource=status", "--type=strategic", "--patch", json.dumps(gone))


def told(api: ClusterApi, node: str) -> Object:
    """The node's condition; an empty one where there is none."""
    [found] = [one for one in api.everywhere("nodes") if one["metadata"]["name"] == node]
    return next((one for one in found["status"]["conditions"] if one["type"] == CONDITION), {})


def break_rank(model: Model) -> None:
    before = model.status().get("recoveries", 0)
    kill(one_process(model.pod(0, 1), WORKER))
    model.until("the rank to be healed", lambda: model.status().get("recoveries", 0) > before, HEALED_SECONDS)


def test_a_node_whose_ranks_fail_is_suspect_until_the_faults_are_old(
    api: ClusterApi, model: Model, operator: LocalOperator
) -> None:
    node = str(model.pod(0, 1)["spec"]["nodeName"])
    break_rank(model)
    model.until("it to be held against the node", lambda: len(model.status().get("nodeFaults", [])) == 1, 30)
    assert told(api, node).get("status") != "True", "one fault is no habit"
    break_rank(model)
    until("the node to be suspect", lambda: told(api, node).get("status") == "True", MARKED_SECONDS, operator.log)
    assert told(api, node)["reason"] == "RanksFailed"
    assert "2 faults of ranks on this node" in told(api, node)["message"]

    aged = [one | {"time": LONG_AGO} for one in model.status()["nodeFaults"]]  # nobody waits for an hour
    model.kubectl("patch", "tpm", model.name, "--subresource=status", "--type=merge", "--patch",
                  json.dumps({"status": {"nodeFaults": aged}}))  # fmt: skip
    until("that to be over", lambda: told(api, node)["status"] == "False", LEARNT_SECONDS, operator.log)
    assert told(api, node)["reason"] == "NoRecentFaults"
    assert "forbidden" not in operator.log()


def test_without_the_switch_nothing_lets_it_touch_nodes(api: ClusterApi) -> None:
    deployment = api.find("deployments", OPERATOR_NAMESPACE, "lockstep")
    assert deployment is not None
    asked = kubectl.attempt("auth", "can-i", "patch", "nodes/status", f"--as={deployed_user(deployment)}")
    assert asked.stdout.strip() == "no"
