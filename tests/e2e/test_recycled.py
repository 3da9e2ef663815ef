"""A group that gives up is put right by the operator: its pods are replaced, and the status and Events tell of it."""

from __future__ import annotations

from tests.support import kubectl
from tests.support.cluster_api import ClusterApi
from tests.support.cluster_lifecycle import uids
from tests.support.cluster_model import Model, tiny_chat
from tests.support.cluster_processes import kill, one_process


def events(model: Model) -> str:
    return kubectl.describe(model.namespace, "tpm", model.name).partition("\nEvents:")[2]


def test_by_the_plain_strategy_a_fault_replaces_all_pods(api: ClusterApi, namespace: str) -> None:
    model = Model(api, namespace, "recycled")
    model.apply(tiny_chat(recovery={"strategy": "RecyclePods"}))
    model.until_ready()
    before = uids(model)

    kill(one_process(model.pod(0, 1), "lockstep: worker"))
    model.until("the repair", lambda: model.status().get("lastRecovery", {}).get("rung") == "RecycleGroup")
    model.until_ready()

    assert not before & uids(model)
    status = model.status()
    assert (status["lastRecovery"]["fault"], status["lastRecovery"]["suspectRank"]) == ("RankLost", 1)
    assert set(status["lastRecovery"]["phases"]) >= {"detect", "recycle"}
    assert status["recoveries"] == 1
    assert status["groups"][0]["recovery"]["spent"]["recycleGroup"] == 1
    for reason in ("RankLost", "RecycleGroup", "Recovered"):
        model.until(f"an Event {reason}", lambda reason=reason: reason in events(model), 20)  # type: ignore[misc]
    with model.client() as client:
        answer = client.completions.create(model=model.served(), prompt="The class statement", max_tokens=8)
    assert answer.choices[0].text


def test_in_mode_observe_the_operator_only_says_what_it_would_do(api: ClusterApi, namespace: str) -> None:
    model = Model(api, namespace, "watched")
    model.apply(tiny_chat(recovery={"strategy": "RecyclePods", "mode": "Observe"}))
    model.until_ready()
    before = uids(model)

    kill(one_process(model.pod(0, 1), "lockstep: worker"))
    model.until("the condition", lambda: model.condition("Stalled").get("reason") == "RecoveryExhausted")
    model.until("an Event", lambda: "WouldRecycleGroup" in events(model), 20)

    assert "not done, because recovery.mode is Observe" in model.condition("Poisoned")["message"]
    assert uids(model) == before
