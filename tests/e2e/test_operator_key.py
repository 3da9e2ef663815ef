"""The operator reads no model's Secret: their tokens follow from its key, and when that is lost, from another."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final

import pytest
from tests.support import kubectl
from tests.support.cluster_api import ClusterApi
from tests.support.cluster_chaos import until_operator_ready
from tests.support.cluster_lifecycle import uids
from tests.support.cluster_model import OPERATOR_NAMESPACE, Model, operator_pods, tiny_chat
from tests.support.cluster_processes import kill, one_process
from tests.support.wait import until

KEY: Final = "lockstep-key"
HEARD_SECONDS: Final = 90.0


@pytest.fixture
def model(api: ClusterApi, namespace: str) -> Iterator[Model]:
    made = Model(api, namespace, "keyed")
    made.apply(tiny_chat())
    made.until_ready()
    yield made
    made.delete()


def key_of(api: ClusterApi) -> str:
    secret = api.find("secrets", OPERATOR_NAMESPACE, KEY)
    return str(secret["data"]["key"]) if secret else ""


def restart_operators(api: ClusterApi) -> None:
    names = [pod["metadata"]["name"] for pod in operator_pods(api)]
    kubectl.kubectl("-n", OPERATOR_NAMESPACE, "delete", "pod", *names, "--grace-period=5")
    until_operator_ready(api)


def nudge_kubelets() -> None:
    """They look at a pod's Secrets when the pod changes, and else about once a minute."""
    annotate = ("annotate", "pods", "--all-namespaces", "-l", "lockstep.dev/model", "--overwrite")
    kubectl.kubectl(*annotate, f"e2e/nudge={time.time():.0f}")


def ask(model: Model) -> str:
    with model.client() as client:
        answer = client.completions.create(model=model.served(), prompt="A module is", max_tokens=16, temperature=0)
    return answer.choices[0].text


def test_a_restarted_operator_and_one_with_another_key_restart_no_pod(model: Model, api: ClusterApi) -> None:
    pods, text, key, first = uids(model), ask(model), key_of(api), model.token("operator")
    known = model.status()["tokens"]["key"]

    restart_operators(api)
    assert key_of(api) == key
    assert model.token("operator") == first

    kubectl.kubectl("-n", OPERATOR_NAMESPACE, "delete", "secret", KEY)
    restart_operators(api)
    until("another key", lambda: key_of(api) not in ("", key), HEARD_SECONDS)
    until("other tokens", lambda: model.status()["tokens"]["key"] != known, HEARD_SECONDS)
    assert model.token("operator") != first
    assert model.is_true("Ready"), "a pod that refuses the operator is alive"
    assert ask(model) == text
    told = [event for event in api.items("events", model.namespace) if event["reason"] == "TokensMade"]
    assert [event["message"].partition(";")[0] for event in told] == [
        f"Secret keyed-operator-{model.status()['tokens']['id']} is made anew: the operator has another key"
    ]

    nudge_kubelets()
    kill(one_process(model.pod(0, 1), "lockstep: worker"))
    until("the group to tell of its repair", lambda: model.status()["recoveries"] > 0, HEARD_SECONDS)
    assert uids(model) == pods
    model.until_ready()
    assert ask(model) == text
