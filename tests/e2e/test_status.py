"""What kubectl shows of a model that serves."""

from __future__ import annotations

import json
import re
from typing import Final

import pytest
from tests.support import kubectl
from tests.support.cluster_model import Model, Object

GOOD: Final = {
    "Ready": "True",
    "Available": "True",
    "ModelLoaded": "True",
    "CollectivesHealthy": "True",
    "Poisoned": "False",
    "Reconciling": "False",
    "Stalled": "False",
    "DisruptionsBounded": "True",
}
DURATION: Final = re.compile(r"^[0-9]+(\.[0-9]+)?(ms|s)$")


def test_every_condition_is_about_the_current_spec_and_says_why(served: Model) -> None:
    resource = served.read()
    conditions = {condition["type"]: condition for condition in resource["status"]["conditions"]}

    assert {name: condition["status"] for name, condition in conditions.items()} == GOOD
    assert resource["status"]["observedGeneration"] == resource["metadata"]["generation"]
    for name, condition in conditions.items():
        assert condition["observedGeneration"] == resource["metadata"]["generation"], name
        assert re.match(r"^[A-Z][A-Za-z]+$", condition["reason"]), name
        assert " " in condition["message"], f"{name} has no sentence: {condition['message']!r}"


def test_every_rank_is_shown_with_its_pod_and_its_latency(served: Model) -> None:
    with served.client() as client:
        client.completions.create(model="tiny", prompt="A class", max_tokens=16, temperature=0)
    served.until("the step latencies", lambda: all("p50" in one.get("stepLatency", {}) for one in _timed(served)), 45)

    [group] = served.status()["groups"]
    assert (group["group"], group["ready"], group["state"]) == (0, True, "Ready")
    assert group["leader"] == f"{served.name}-0-0"
    assert group["leaderUID"] == served.pod(0, 0)["metadata"]["uid"]
    for number, rank in enumerate(group["ranks"]):
        pod = served.pod(0, number)
        assert (rank["rank"], rank["pod"], rank["state"]) == (number, pod["metadata"]["name"], "Ready")
        assert rank["node"] == pod["spec"]["nodeName"]
        assert rank["epoch"] == group["epoch"] >= 1
        assert DURATION.match(rank["stepLatency"]["p50"])
        assert DURATION.match(rank["stepLatency"]["p99"])
        assert rank["lastStepTime"]
    assert DURATION.match(served.status()["stepLatency"]["p50"])


def _timed(model: Model) -> list[Object]:
    """The model and its ranks, of which the proof is a step, too."""
    status = model.status()
    return [status, *(rank for group in status["groups"] for rank in group["ranks"])]


def test_kubectl_get_prints_the_state_in_one_line(served: Model) -> None:
    header, line = served.kubectl("get", "tpm").splitlines()

    assert re.split(r"\s{2,}", header.strip()) == [
        "NAME", "GROUPS", "READY", "AVAILABLE", "RANKS", "REASON", "RECOVERIES", "LAST FAULT", "AGE",
    ]  # fmt: skip
    assert line.split()[:6] == ["tiny-chat", "1/1", "True", "True", "2/2", "Ready"]
    assert "tiny-chat" in served.kubectl("get", "all"), "the category all shows models too"


def test_kubectl_describe_tells_the_story(served: Model) -> None:
    text = kubectl.describe(served.namespace, "tpm", served.name)

    for condition in served.status()["conditions"]:
        assert condition["message"] in text
    events = text.partition("\nEvents:")[2]
    assert "Ready" in events, f"no event tells that the model became ready:{events}"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("tpm", "split it between them"),
        ("tpm.spec.tensorParallelSize", "Ranks that the model is split over"),
        ("tpm.spec.model.hostPath.path", "absolute path on the node"),
        ("tpm.status.conditions", "Stalled"),
    ],
)
def test_kubectl_explain_is_the_manual(served: Model, path: str, words: str) -> None:
    assert words in " ".join(served.kubectl("explain", path).split())


def test_the_scale_subresource_names_the_pods_to_an_autoscaler(served: Model) -> None:
    path = f"/apis/lockstep.dev/v1alpha1/namespaces/{served.namespace}/tensorparallelmodels/{served.name}/scale"
    scale = json.loads(served.kubectl("get", "--raw", path))

    assert scale["status"]["replicas"] == 1
    leaders = served.kubectl("get", "pods", "-l", scale["status"]["selector"], "-o", "name").split()
    assert leaders == [f"pod/{served.name}-0-0"]
