"""The affinity that docs/gpu.md tells people to lay over their pods does to groups what it says."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import yaml
from tests.support import kubectl
from tests.support.cluster_api import ClusterApi
from tests.support.wait import until

NewNamespace = Callable[[str], str]
Object = dict[str, Any]

PAGE: Final = (kubectl.ROOT / "docs" / "gpu.md").read_text()
DECIDED_SECONDS: Final = 30.0


def documented() -> Object:
    """The affinity, with the only topology that one node has."""
    (block,) = [block for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if "mismatchLabelKeys" in block]
    text = block.replace("topology.kubernetes.io/zone", "kubernetes.io/hostname")
    affinity: Object = yaml.safe_load(text)["template"]["spec"]["affinity"]
    return affinity


def pod(namespace: str, group: int, index: int) -> Object:
    """As a rank pod is labelled; it has nothing to run, since only the scheduler is asked."""
    labels = {"lockstep.dev/model": "qwen3-8b", "lockstep.dev/group": str(group)}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": namespace, "name": f"qwen3-8b-{group}-{index}", "labels": labels},
        "spec": {
            "containers": [{"name": "lockstep", "image": "localhost/nothing:none", "imagePullPolicy": "Never"}],
            "affinity": documented(),
            "terminationGracePeriodSeconds": 0,
        },
    }


def test_a_groups_pods_stay_together_and_groups_apart(api: ClusterApi, namespace: str) -> None:
    def words(name: str) -> str:
        """What the scheduler says of a pod: empty before it has, "placed" or its refusal."""
        found = api.find("pods", namespace, name) or {}
        told = [one for one in found.get("status", {}).get("conditions", []) if one["type"] == "PodScheduled"]
        return "placed" if told and told[0]["status"] == "True" else str(told[0]["message"]) if told else ""

    kubectl.apply_all([pod(namespace, 0, 0), pod(namespace, 0, 1)])
    until("the first group to be placed", lambda: words("qwen3-8b-0-0") == words("qwen3-8b-0-1") == "placed", 30)

    kubectl.apply(pod(namespace, 1, 0))
    until("the scheduler's word on the second", lambda: words("qwen3-8b-1-0"), DECIDED_SECONDS)
    assert "anti-affinity" in words("qwen3-8b-1-0")
