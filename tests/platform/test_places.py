"""Where groups are placed by what docs/gpu.md advises: racks, claimed devices, ports on their nodes' network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import pytest
import yaml
from tests.platform.conftest import GPU, PLACED_SECONDS, Place
from tests.support.chart import ROOT
from tests.support.kwok import FakeNodes
from tests.support.wait import until

pytestmark = pytest.mark.platform

Object = dict[str, Any]

DRIVER: Final = "gpu.example.com"
RUNS: Final = 5


def example(name: str) -> Object:
    found: Object = yaml.safe_load((ROOT / "examples" / name).read_text())
    return found


def test_each_group_has_a_rack_of_its_own(place: Place, nodes: FakeNodes) -> None:
    """By the example's rules, as they are, with two nodes in each of two racks."""
    spec = example("racks.yaml")["spec"]
    rules = spec["template"]["spec"]["affinity"]
    (key,) = {term["topologyKey"] for kind in rules.values() for terms in kind.values() for term in terms}
    racks = {node: rack for rack in ("a", "b") for node in nodes.add(2, {GPU: "8"}, {key: rack})}
    spec["model"], spec["accelerator"] = {"hostPath": {"path": "/models/none"}}, {"resourceName": GPU}
    spec["template"]["spec"] |= nodes.placement
    for _ in range(RUNS):
        place.model("qwen3-32b", **spec)
        until(
            "two groups of two pods",
            lambda: sorted(len(names) for names in place.nodes("qwen3-32b").values()) == [2, 2],
            PLACED_SECONDS,
            place.explain,
        )
        found = [{racks[node] for node in names} for names in place.nodes("qwen3-32b").values()]
        assert sorted(found) in ([{"a"}, {"b"}], [{"b"}, {"a"}])
        place.delete("qwen3-32b")


def devices(node: str, count: int) -> Object:
    """As a driver of dynamic resource allocation publishes them."""
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceSlice",
        "metadata": {"name": f"{node}-gpus"},
        "spec": {
            "driver": DRIVER,
            "nodeName": node,
            "pool": {"name": node, "generation": 1, "resourceSliceCount": 1},
            "devices": [{"name": f"gpu-{number}"} for number in range(count)],
        },
    }


def claimed(place: Place, count: int) -> Mapping[str, Any]:
    """The class of these devices, a template of claims for so many, and the pod's part that uses it."""
    expression = f"device.driver == '{DRIVER}'"
    version = {"apiVersion": "resource.k8s.io/v1"}
    request = {"name": "gpus", "exactly": {"deviceClassName": DRIVER, "count": count}}
    place.plane.apply(
        version
        | {
            "kind": "DeviceClass",
            "metadata": {"name": DRIVER},
            "spec": {"selectors": [{"cel": {"expression": expression}}]},
        },
        version
        | {
            "kind": "ResourceClaimTemplate",
            "metadata": {"name": "gpus", "namespace": place.namespace},
            "spec": {"spec": {"devices": {"requests": [request]}}},
        },
    )
    return {
        "resourceClaims": [{"name": "gpus", "resourceClaimTemplateName": "gpus"}],
        "containers": [{"name": "lockstep", "resources": {"claims": [{"name": "gpus"}]}}],
    }


def test_gpus_that_pods_claim_place_them(place: Place, nodes: FakeNodes) -> None:
    names = nodes.add(2)
    place.plane.apply(*(devices(node, 8) for node in names))
    template = {"spec": {**nodes.placement, **claimed(place, 8)}}
    place.model("chat", tensorParallelSize=8, ranksPerPod=8, replicas=3, backend="nccl", template=template)
    until(
        "two groups on a node each, and the third to find none",
        lambda: len(place.nodes("chat")) == 2 and place.why_waiting("chat") == ["Unschedulable"],
        PLACED_SECONDS,
        place.explain,
    )
    assert set().union(*place.nodes("chat").values()) == set(names)
    claims = place.plane.get("resourceclaims", f"--namespace={place.namespace}")["items"]
    results = [one["status"]["allocation"]["devices"]["results"] for one in claims if one.get("status")]
    assert sorted(map(len, results)) == [8, 8]
    place.until_at_rest()


def test_on_a_nodes_network_models_share_it_only_with_other_ports(place: Place, nodes: FakeNodes) -> None:
    (node,) = nodes.add(1)
    template = {"spec": {**nodes.placement, "hostNetwork": True}}
    place.model("first", template=template)
    until("the first", lambda: place.nodes("first") == {0: {node}}, PLACED_SECONDS, place.explain)

    place.model("second", template=template)
    until(
        "the second to find no node",
        lambda: place.why_waiting("second") == ["Unschedulable"],
        PLACED_SECONDS,
        place.explain,
    )
    until(
        "its model to tell why",
        lambda: "free ports" in place.condition("second").get("message", ""),
        PLACED_SECONDS,
        place.explain,
    )

    place.model("second", template=template, ports={"api": 9000, "bus": 9400, "status": 9401})
    until("the second", lambda: place.nodes("second") == {0: {node}}, PLACED_SECONDS, place.explain)
    place.until_at_rest()
