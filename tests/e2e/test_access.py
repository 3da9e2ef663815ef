"""Who may use a model: its keys change without a restart, and the policy before its port is the user's to say.

The development cluster's network plugin enforces no NetworkPolicies, so what they say is looked at and not whether a
packet gets through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest
from tests.support import kubectl
from tests.support.cluster_api import ClusterApi
from tests.support.cluster_model import Model, tiny_chat
from tests.support.http import HTTP

NewNamespace = Callable[[str], str]
Object = dict[str, Any]

SEEN_SECONDS: Final = 60.0
KUBELET_SECONDS: Final = 150.0
ANY_USER: Final = 1_000_680_000
GATEWAY: Final = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "gateway"}}, "podSelector": {}}
OFFICE: Final = {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}


@pytest.fixture(scope="module")
def guarded(api: ClusterApi, new_namespace: NewNamespace) -> Iterator[Model]:
    model = Model(api, new_namespace("access"), "guarded")
    write_keys(model, "old")
    model.apply(spec())
    model.until_ready()
    yield model
    model.delete()


def spec(**network: Any) -> Object:
    """Its pod runs as a user that no image knows, as OpenShift chooses them: the keys are there for it, too."""
    made = tiny_chat(tensorParallelSize=1, apiKeySecretRef={"name": "keys", "key": "chat"})
    user = {"runAsUser": ANY_USER, "runAsGroup": ANY_USER}
    template = {"spec": made["template"]["spec"] | {"securityContext": user}}
    return made | {"template": template} | ({"network": network} if network else {})


def write_keys(model: Model, *keys: str) -> None:
    secret: Object = {"apiVersion": "v1", "kind": "Secret", "metadata": {"namespace": model.namespace, "name": "keys"}}
    kubectl.apply(secret | {"stringData": {"chat": "\n".join(keys) + "\n"}})


def answers(model: Model) -> dict[str, int]:
    """What a client gets with each key."""
    headers = {key: {"Authorization": f"Bearer {key}"} for key in ("old", "new", "wrong")}
    return {key: HTTP.get(f"{model.url()}/v1/models", headers=sent).status_code for key, sent in headers.items()}


def replace_keys(model: Model, *keys: str, kept: str) -> None:
    """Until the pod takes these and no others; the one that is kept is valid all the while."""
    write_keys(model, *keys)
    # The kubelet looks at a pod's Secrets when the pod changes, and else about once a minute.
    model.kubectl("annotate", "pod", f"{model.name}-0-0", f"lockstep.test/keys={len(keys)}", "--overwrite")
    wanted = {key: 200 if key in keys else 401 for key in ("old", "new", "wrong")}

    def taken() -> bool:
        seen = answers(model)
        assert seen[kept] == 200, seen
        return seen == wanted

    model.until(f"the keys {keys} to be valid", taken, KUBELET_SECONDS)


def test_a_key_is_replaced_without_a_restart_and_without_a_wrong_answer(guarded: Model) -> None:
    pod = guarded.pod(0, 0)["metadata"]["uid"]
    assert answers(guarded) == {"old": 200, "new": 401, "wrong": 401}

    replace_keys(guarded, "old", "new", kept="old")
    replace_keys(guarded, "new", kept="new")

    assert guarded.pod(0, 0)["metadata"]["uid"] == pod


def clients(model: Model) -> list[Object] | None:
    """The peers that may reach the API by the group's policy; None where there is no policy."""
    policy = model.api.find("networkpolicies", model.namespace, f"{model.name}-0")
    if policy is None:
        return None
    api = [{"port": 8000, "protocol": "TCP"}]
    return [peer for rule in policy["spec"]["ingress"] if rule.get("ports") == api for peer in rule["from"]]


def test_who_may_reach_the_api_is_the_users_to_say(guarded: Model) -> None:
    pod = guarded.pod(0, 0)["metadata"]["uid"]
    assert clients(guarded) == [{"podSelector": {}}]

    guarded.apply(spec(**{"from": [GATEWAY, OFFICE]}))
    guarded.until("the peers in the policy", lambda: clients(guarded) == [GATEWAY, OFFICE], SEEN_SECONDS)

    guarded.apply(spec(policy="None"))
    guarded.until("the policy to go", lambda: clients(guarded) is None, SEEN_SECONDS)

    guarded.apply(spec())
    guarded.until("the policy to be back", lambda: clients(guarded) == [{"podSelector": {}}], SEEN_SECONDS)
    guarded.until_ready()
    assert guarded.pod(0, 0)["metadata"]["uid"] == pod, "no pod is replaced for it"
