"""Kubernetes' own autoscaler, with the example that the project ships, on a model under load."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import yaml
from tests.support import kubectl
from tests.support.cluster_api import ClusterApi
from tests.support.cluster_lifecycle import until_groups
from tests.support.cluster_load import Load
from tests.support.cluster_model import Model, manifest, tiny_chat
from tests.support.custom_metrics import custom_metrics

EXAMPLE: Final = kubectl.ROOT / "examples" / "autoscaling" / "hpa.yaml"
DECIDED_SECONDS: Final = 90.0  # the autoscaler looks every 15 s
CLIENTS: Final = 6


def autoscaler(model: Model) -> dict[str, Any]:
    """The example, for this model, and with the patience of a test."""
    found: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text())
    found["metadata"] = {"namespace": model.namespace, "name": model.name}
    spec = found["spec"]
    spec["scaleTargetRef"]["name"] = model.name
    spec["maxReplicas"] = 2
    waiting = next(one["pods"] for one in spec["metrics"] if one["pods"]["metric"]["name"].endswith("waiting"))
    waiting["target"]["averageValue"] = "2"
    spec["behavior"]["scaleDown"] = {"stabilizationWindowSeconds": 0}
    return found


def test_a_longer_queue_brings_a_second_group_and_an_empty_one_takes_it_away(
    api: ClusterApi, namespace: str, folder: Path
) -> None:
    """Without a failed request, and nothing that a GitOps tool would take for drift."""
    model = Model(api, namespace, "scaled")
    file = manifest(namespace, model.name, tiny_chat(engine={"maxModelLen": 2048, "maxSequences": 1}))
    assert "replicas" not in file["spec"]
    kubectl.apply(file)
    model.until_ready()
    with custom_metrics(api, namespace, folder):
        kubectl.apply(autoscaler(model))
        with Load(model, CLIENTS, pause=0) as heavy:
            model.until("a second group to be asked for", lambda: wanted(model) == 2, DECIDED_SECONDS)
            model.until_serving(2)
        with Load(model, clients=1) as light:
            model.until("the second group not to be wanted", lambda: wanted(model) == 1, DECIDED_SECONDS)
            until_groups(model, 1)

    assert heavy.failures + light.failures == []
    assert min(heavy.answered, light.answered) > CLIENTS
    assert kubectl.difference(file) == ""


def wanted(model: Model) -> int:
    found: int = model.read()["spec"]["replicas"]
    return found
