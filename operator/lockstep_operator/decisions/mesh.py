"""What the pods and policies of a model need in a service mesh (pure).

Istio's sidecars take over a pod's connections, and close what they don't know: the ranks meet on ports that nobody
declared. So only the API's port is theirs. In ambient mode connections between pods of the mesh arrive on one port,
whatever port they are for, and the kubelet's probes come from an address of Istio's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from lockstep_operator.types.spec import Model

ISTIO: Final = "Istio"
HBONE_PORT: Final = 15008
INBOUND: Final = "traffic.sidecar.istio.io/includeInboundPorts"
OUTBOUND: Final = "traffic.sidecar.istio.io/includeOutboundIPRanges"
PROBERS: Final = ("169.254.7.127/32", "fd16:9254:7127:1337:ffff:ffff:ffff:ffff/128")

Rule = Mapping[str, Any]


def pod_annotations(model: Model) -> Mapping[str, str]:
    """Of the pods."""
    return {INBOUND: str(model.ports.api), OUTBOUND: ""} if model.network.mesh == ISTIO else {}


def rules(model: Model, peers: Sequence[Rule]) -> list[Rule]:
    """Of a group's NetworkPolicy: for the peers that it admits to some port, and for probes."""
    if model.network.mesh != ISTIO:
        return []
    probers = [{"ipBlock": {"cidr": cidr}} for cidr in PROBERS]
    tunnel = [{"from": list(peers), "ports": [{"port": HBONE_PORT, "protocol": "TCP"}]}] if peers else []
    return [*tunnel, {"from": probers, "ports": [{"port": model.ports.status, "protocol": "TCP"}]}]
