"""What pods and Services say to monitors, gateways and meshes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.support.kube_fake import resource
from tests.support.operator_models import SETTINGS, model

from lockstep_operator.decisions import manifests
from lockstep_operator.decisions.pod_template import pod_template
from lockstep_operator.types.spec import Model, parse
from lockstep_operator.types.spec_blocks import Network

SIDECAR = {
    "traffic.sidecar.istio.io/includeInboundPorts": "8000",
    "traffic.sidecar.istio.io/includeOutboundIPRanges": "",
}
PROBERS = {"169.254.7.127/32", "fd16:9254:7127:1337:ffff:ffff:ffff:ffff/128"}


def metadata(made: Model) -> dict[str, Any]:
    found: dict[str, Any] = pod_template(made, 0, "abc", SETTINGS)["metadata"]
    return found


def ingress(made: Model, **settings: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = manifests.network_policy(made, 0, replace(SETTINGS, **settings))["spec"]["ingress"]
    assert all(rule["from"] for rule in found), "an empty list lets in everybody"
    return found


def test_pods_tell_monitors_and_gateways_what_they_are() -> None:
    labels = metadata(model())["labels"]
    assert labels["app.kubernetes.io/instance"] == "chat"
    assert {labels["llm-d.ai/engine-type"], labels["inference.networking.k8s.io/engine-type"]} == {"lockstep"}


def test_every_port_of_a_service_says_what_it_speaks() -> None:
    services = (manifests.serving_service(model()), manifests.headless_service(model(), 0))
    spoken = {port["name"]: port["appProtocol"] for service in services for port in service["spec"]["ports"]}
    assert spoken == {"http": "http", "bus": "tcp", "status": "http"}


def test_sidecars_serve_the_api_alone_unless_the_template_says_otherwise() -> None:
    made = model(network=Network(mesh="Istio"))
    assert metadata(made)["annotations"] == SIDECAR
    own = {"traffic.sidecar.istio.io/includeInboundPorts": "*"}
    assert metadata(replace(made, template={"metadata": {"annotations": own}}))["annotations"] == SIDECAR | own


def test_tunnels_of_a_mesh_are_admitted_from_those_who_may_reach_a_port_and_probes_from_the_meshs_address() -> None:
    members, api, status, tunnel, probes = ingress(model(network=Network(mesh="Istio")))
    assert tunnel == {"from": [*api["from"], *status["from"]], "ports": [{"port": 15008, "protocol": "TCP"}]}
    assert {peer["ipBlock"]["cidr"] for peer in probes["from"]} == PROBERS
    assert probes["ports"] == status["ports"]
    assert "ports" not in members
    nobody = ingress(model(network=Network(mesh="Istio", peers=())), operator_namespace=None)
    assert [rule.get("ports") for rule in nobody] == [None, probes["ports"]]


@pytest.mark.parametrize("mesh", [None, "None"])
def test_without_a_mesh_nothing_is_said_of_one(mesh: str | None) -> None:
    made = model(network=Network(mesh=mesh))
    assert "annotations" not in metadata(made)
    assert ingress(made) == ingress(model())


def test_the_mesh_is_parsed() -> None:
    live = resource(network={"mesh": "Istio"})
    live["metadata"] |= {"uid": "u"}
    assert parse(live).network == Network(mesh="Istio")
