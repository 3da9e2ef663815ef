"""What bench.scale makes and removes: models, or other sets, of one group of four fake pods, in twenty namespaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, Final

import httpx
import yaml
from tests.support.cluster_api import client_context
from tests.support.control_plane import ControlPlane

Object = dict[str, Any]
Made = Callable[[int, Mapping[str, Any]], Object]

NAMESPACES: Final = 20
RANKS: Final = 4
WRITERS: Final = 4
MODELS: Final = "/apis/lockstep.dev/v1alpha1/namespaces/{}/tensorparallelmodels"


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


@contextmanager
def administrator(plane: ControlPlane) -> Iterator[httpx.Client]:
    config = yaml.safe_load(plane.kubeconfig.read_text())
    context = client_context(config["clusters"][0]["cluster"], config["users"][0]["user"])
    with httpx.Client(base_url=plane.url, verify=context, timeout=60, trust_env=False) as http:
        yield http


def create_all(plane: ControlPlane, count: int, made: Made, placement: Mapping[str, Any], path: str = MODELS) -> None:
    """Over a few connections: kubectl would take minutes to look at them. What is there already stays."""
    with administrator(plane) as http:

        def create(where: str, manifest: Object) -> None:
            answer = http.post(where, json=manifest)
            if answer.status_code != HTTPStatus.CONFLICT:
                answer.raise_for_status()

        for number in range(NAMESPACES):
            namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": f"bench-{number}"}}
            create("/api/v1/namespaces", namespace)
        with ThreadPoolExecutor(WRITERS) as pool:
            manifests = [made(number, placement) for number in range(count)]
            places = [path.format(manifest["metadata"]["namespace"]) for manifest in manifests]
            for done in pool.map(create, places, manifests):
                assert done is None


def remove_models(plane: ControlPlane, until: Callable[[str, Callable[[], bool]], None]) -> None:
    """All, and wait for their pods to go."""
    with administrator(plane) as http:
        for number in range(NAMESPACES):
            http.delete(MODELS.format(f"bench-{number}")).raise_for_status()

        def gone() -> bool:
            answer = http.get("/api/v1/pods", params={"labelSelector": "lockstep.dev/model", "limit": 1})
            return not answer.raise_for_status().json()["items"]

        until("the models' pods to go", gone)
