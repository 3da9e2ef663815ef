"""Reads of the API server over its REST paths: what the tests poll with, at a millisecond instead of a process each."""

from __future__ import annotations

import base64
import ssl
import tempfile
from pathlib import Path
from typing import Any, Final

import httpx
import yaml

Object = dict[str, Any]

GROUP: Final = "lockstep.dev"
VERSION: Final = "v1alpha1"
# Kind's plural -> where the API server keeps it. Everything that the operator may make for a model is here.
PREFIXES: Final = {
    "tensorparallelmodels": f"/apis/{GROUP}/{VERSION}",
    "pods": "/api/v1",
    "nodes": "/api/v1",
    "services": "/api/v1",
    "secrets": "/api/v1",
    "serviceaccounts": "/api/v1",
    "configmaps": "/api/v1",
    "events": "/api/v1",
    "endpointslices": "/apis/discovery.k8s.io/v1",
    "statefulsets": "/apis/apps/v1",
    "deployments": "/apis/apps/v1",
    "controllerrevisions": "/apis/apps/v1",
    "networkpolicies": "/apis/networking.k8s.io/v1",
    "poddisruptionbudgets": "/apis/policy/v1",
    "persistentvolumeclaims": "/api/v1",
    "leases": "/apis/coordination.k8s.io/v1",
}


class ClusterApi:
    """One kept-alive connection to the API server, as the kubeconfig's user."""

    def __init__(self, kubeconfig: Path) -> None:
        config = yaml.safe_load(kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        self._http = httpx.Client(base_url=cluster["server"], verify=client_context(cluster, user), timeout=20)

    def close(self) -> None:
        self._http.close()

    def find(self, plural: str, namespace: str, name: str) -> Object | None:
        """The object as the API server has it now; None if there is none."""
        response = self._http.get(f"{PREFIXES[plural]}/namespaces/{namespace}/{plural}/{name}")
        if response.status_code == httpx.codes.NOT_FOUND:
            return None
        return self._parsed(response)

    def items(self, plural: str, namespace: str, selector: str = "") -> list[Object]:
        """All objects of a kind in a namespace, or those whose labels match."""
        query = {"labelSelector": selector} if selector else {}
        listed = self._parsed(self._http.get(f"{PREFIXES[plural]}/namespaces/{namespace}/{plural}", params=query))
        found: list[Object] = listed["items"]
        return found

    def everywhere(self, plural: str, selector: str = "") -> list[Object]:
        """The same, of all namespaces."""
        query = {"labelSelector": selector} if selector else {}
        found: list[Object] = self._parsed(self._http.get(f"{PREFIXES[plural]}/{plural}", params=query))["items"]
        return found

    def node(self, name: str) -> Object:
        return self._parsed(self._http.get(f"/api/v1/nodes/{name}"))

    def log(self, namespace: str, pod: str, *, tail: int | None = None, since: str = "") -> str:
        """A pod's log, `since` a time in RFC 3339; what the API server says instead, when it has none."""
        query: dict[str, str | int] = {"sinceTime": since} if since else {}
        if tail is not None:
            query["tailLines"] = tail
        return self._http.get(f"/api/v1/namespaces/{namespace}/pods/{pod}/log", params=query).text

    @staticmethod
    def _parsed(response: httpx.Response) -> Object:
        response.raise_for_status()
        parsed: Object = response.json()
        return parsed


def client_context(cluster: Object, user: Object) -> ssl.SSLContext:
    """The context of a kubeconfig with inline certificates; Python takes a client's certificate only from a file."""
    context = ssl.create_default_context(cadata=base64.b64decode(cluster["certificate-authority-data"]).decode())
    with tempfile.NamedTemporaryFile(suffix=".pem") as pem:
        pem.write(base64.b64decode(user["client-certificate-data"]) + base64.b64decode(user["client-key-data"]))
        pem.flush()
        context.load_cert_chain(pem.name)
    return context
