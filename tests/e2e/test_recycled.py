"""A group that gives up is put right by the operator, if it may: pods are replaced; the status and Events say so."""

from __future__ import annotations

from tests.support import kubectl
from tests.support.cluster_api import ClusterApi
from tests.support.cluster_lifecycle import change_spec, uids
from tests.support.cluster_model import Model, tiny_chat
from tests.support.cluster_processes import kill, one_process


def events(model: Model) -> str:
    return kubectl.describe(model.namespace, "tpm", model.name).partition("\nEvents:")[2]


def test_a_group_that_gives_up_is_replaced_once_its_operator_may(api: ClusterApi, namespace: str) -> None:
    model = Model(api, namespace, "recycled")
    model.apply(tiny_chat(recovery={"strategy": "RecyclePods", "mode": "Observe"}))
    model.until_ready()
    before = uids(model)

    kill(one_process(model.pod(0, 1), "lockstep: worker"))
    model.until("the condition", lambda: model.condition("Stalled").get("reason") == "RecoveryExhausted")
    model.until("an Event", lambda: "WouldRecycleGroup" in events(model), 20)
    assert "not done, because recovery.mode is Observe" in model.condition("Poisoned")["message"]
    assert uids(model) == before

    change_spec(model, '{"spec": {"recovery": {"mode": "Enforce"}}}')
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
