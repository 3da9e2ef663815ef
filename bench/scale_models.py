"""The models of bench.scale: one group of four fake pods each, in twenty namespaces."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import httpx
import yaml
from tests.support.cluster_api import client_context
from tests.support.control_plane import ControlPlane

Object = dict[str, Any]

NAMESPACES: Final = 20
RANKS: Final = 4
WRITERS: Final = 4


def model(number: int, placement: Mapping[str, Any]) -> Object:
    return {
        "apiVersion": "lockstep.dev/v1alpha1",
        "kind": "TensorParallelModel",
        "metadata": {"namespace": f"bench-{number % NAMESPACES}", "name": f"m{number}"},
        "spec": {
            "model": {"hostPath": {"path": "/model"}},
            "tensorParallelSize": RANKS,
            "backend": "cpu",
            "template": {"spec": {**placement, "containers": []}},
        },
    }


def apply_many(plane: ControlPlane, manifests: Iterable[Object]) -> None:
    """Created over a few connections: kubectl would take minutes to look at them."""
    config = yaml.safe_load(plane.kubeconfig.read_text())
    context = client_context(config["clusters"][0]["cluster"], config["users"][0]["user"])
    with httpx.Client(base_url=plane.url, verify=context, timeout=60, trust_env=False) as http:
        for number in range(NAMESPACES):
            namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": f"bench-{number}"}}
            http.post("/api/v1/namespaces", json=namespace).raise_for_status()

        def create(manifest: Object) -> None:
            path = f"/apis/lockstep.dev/v1alpha1/namespaces/{manifest['metadata']['namespace']}/tensorparallelmodels"
            http.post(path, json=manifest).raise_for_status()

        with ThreadPoolExecutor(WRITERS) as pool:
            for done in pool.map(create, manifests):
                assert done is None
