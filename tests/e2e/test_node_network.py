"""A model on its node's own network, as RDMA wants it, with ports that nobody else has there."""

from __future__ import annotations

from tests.support.cluster_api import ClusterApi
from tests.support.cluster_model import RESOURCES, Model, tiny_chat
from tests.support.ports import free_port


def test_it_serves_on_ports_of_its_own_and_clients_see_no_difference(api: ClusterApi, namespace: str) -> None:
    model, ports = Model(api, namespace, "hosted"), {name: free_port() for name in ("api", "bus", "status")}
    container = {"name": "lockstep", "resources": RESOURCES}
    template = {"spec": {"hostNetwork": True, "containers": [container]}}
    model.apply(tiny_chat(ranksPerPod=2, ports=ports, template=template))
    model.until_ready()

    (pod,) = model.pods()
    assert pod["status"]["podIP"] == pod["status"]["hostIP"]
    assert pod["spec"]["dnsPolicy"] == "ClusterFirstWithHostNet"
    listed = {port["name"]: (port["containerPort"], port["hostPort"]) for port in pod["spec"]["containers"][0]["ports"]}
    assert listed == {name: (port, port) for name, port in ports.items()}
    with model.client() as client:
        answer = client.completions.create(model=model.served(), prompt="A module is", max_tokens=8, temperature=0)
    assert answer.choices[0].text
    model.delete()
