"""One TensorParallelModel of a test: applied with kubectl, watched by REST, talked to through its Service."""

from __future__ import annotations

import base64
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from openai import DefaultHttpxClient, OpenAI
from tests.support import kubectl
from tests.support.cluster_api import ClusterApi
from tests.support.http import NO_AUTHORITIES
from tests.support.wait import until

Object = dict[str, Any]

TINY_CHAT: Final = "/var/lib/lockstep/models/tiny-chat"
READY_SECONDS: Final = 150.0  # a deadline, not an expectation: two cores may be busy with other tests' pods
REACHED_SECONDS: Final = 30.0
GONE_SECONDS: Final = 90.0
# Several models share the two cores of the machine that tests run on.
RESOURCES: Final = {"requests": {"cpu": "50m", "memory": "256Mi"}}


def tiny_chat(**spec: Any) -> Object:
    """The spec of a small model in two pods, with the given fields laid over it."""
    small: Object = {
        "model": {"hostPath": {"path": TINY_CHAT}},
        "tensorParallelSize": 2,
        "dtype": "float32",
        "backend": "cpu",
        "engine": {"maxModelLen": 2048, "maxSequences": 16},
        "template": {"spec": {"containers": [{"name": "lockstep", "resources": RESOURCES}]}},
    }
    return small | spec


def manifest(namespace: str, name: str, spec: Object) -> Object:
    return {
        "apiVersion": "lockstep.dev/v1alpha1",
        "kind": "TensorParallelModel",
        "metadata": {"namespace": namespace, "name": name},
        "spec": spec,
    }


@dataclass(frozen=True, slots=True)
class Model:
    """A handle, not a copy: everything is read anew."""

    api: ClusterApi
    namespace: str
    name: str

    def apply(self, spec: Object) -> None:
        kubectl.apply(manifest(self.namespace, self.name, spec))

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        return kubectl.kubectl("-n", self.namespace, *arguments, stdin=stdin)

    def delete(self) -> None:
        """`kubectl delete` without waiting for what hangs on it."""
        self.kubectl("delete", "tpm", self.name, "--wait=false")

    # --- what the cluster says -------------------------------------------------------------------------------------

    def read(self) -> Object:
        found = self.api.find("tensorparallelmodels", self.namespace, self.name)
        assert found is not None, f"there is no model {self.namespace}/{self.name}"
        return found

    def secret(self, kind: str) -> Object | None:
        """The newest with a `token` (the group's) or an `operator` token."""
        found = self.status().get("tokens")
        return self.api.find("secrets", self.namespace, f"{self.name}-{kind}-{found['id']}") if found else None

    def token(self, kind: str = "token") -> str:
        secret = self.secret(kind)
        assert secret is not None
        return base64.b64decode(secret["data"]["token"]).decode()

    def status(self) -> Object:
        status: Object = self.read().get("status", {})
        return status

    def condition(self, kind: str) -> Object:
        """The condition if it is about the current generation of the spec; else an empty one."""
        model = self.read()
        for condition in model.get("status", {}).get("conditions", []):
            if condition["type"] == kind and condition.get("observedGeneration") == model["metadata"]["generation"]:
                found: Object = condition
                return found
        return {}

    def is_true(self, kind: str) -> bool:
        return bool(self.condition(kind).get("status") == "True")

    def children(self, plural: str) -> list[Object]:
        return self.api.items(plural, self.namespace, f"lockstep.dev/model={self.name}")

    def pods(self) -> list[Object]:
        """Pods that are not on their way out, by name."""
        living = [pod for pod in self.children("pods") if "deletionTimestamp" not in pod["metadata"]]
        return sorted(living, key=lambda pod: str(pod["metadata"]["name"]))

    def pod(self, group: int, index: int) -> Object:
        found = self.api.find("pods", self.namespace, f"{self.name}-{group}-{index}")
        assert found is not None, f"group {group} has no pod {index}"
        return found

    # --- waiting ---------------------------------------------------------------------------------------------------

    def until(self, what: str, look: Callable[[], bool], seconds: float = READY_SECONDS) -> None:
        until(what, look, seconds, self.explain)

    def until_ready(self, seconds: float = READY_SECONDS) -> None:
        """Until the operator says of the current generation that all of it serves."""
        self.until(f"{self.name} to be Ready", self._is_settled, seconds)
        self._until_routed()

    def until_serving(self, groups: int, seconds: float = READY_SECONDS) -> None:
        """Until exactly so many groups' leaders are behind the Service, and the model is Ready."""
        self.until(f"{groups} endpoints", lambda: self._is_settled() and len(self.endpoints()) == groups, seconds)
        self._until_routed()

    def _until_routed(self) -> None:
        """Nodes learn of a Service's new endpoints a moment (kube-proxy's sync, 1 s) after the API server has them."""
        self.until("the node to route to the Service", self._accepts_connections, REACHED_SECONDS)

    def _accepts_connections(self) -> bool:
        address = urlsplit(self.url())
        try:
            socket.create_connection((str(address.hostname), int(address.port or 0)), timeout=5).close()
        except OSError:
            return False
        return True

    def until_gone(self, seconds: float = GONE_SECONDS) -> None:
        self.until("nothing to be left", lambda: not self.leftovers(), seconds)

    def _is_settled(self) -> bool:
        return self.is_true("Ready") and self.condition("Reconciling").get("status") == "False"

    def endpoints(self) -> list[str]:
        """The addresses that the serving Service sends requests to."""
        slices = self.api.items("endpointslices", self.namespace, f"kubernetes.io/service-name={self.name}")
        return [
            address
            for part in slices
            for endpoint in part.get("endpoints") or []
            if endpoint.get("conditions", {}).get("ready")
            for address in endpoint["addresses"]
        ]

    def leftovers(self) -> list[str]:
        """Everything of the model that still exists, as kind/name."""
        kinds = (
            "pods", "statefulsets", "services", "secrets", "serviceaccounts", "networkpolicies", "configmaps",
            "endpointslices", "controllerrevisions", "poddisruptionbudgets", "persistentvolumeclaims",
        )  # fmt: skip
        found = [
            f"{kind}/{item['metadata']['name']}"
            for kind in kinds
            for item in self.api.items(kind, self.namespace)
            if item["metadata"]["name"] == self.name or item["metadata"]["name"].startswith(f"{self.name}-")
        ]
        return found + (
            ["the model itself"] if self.api.find("tensorparallelmodels", self.namespace, self.name) else []
        )

    # --- what clients see ------------------------------------------------------------------------------------------

    def url(self) -> str:
        """The serving Service, by its cluster address: the node routes to it like any pod."""
        service = self.api.find("services", self.namespace, self.name)
        assert service is not None, f"{self.name} has no Service"
        return f"http://{service['spec']['clusterIP']}:{service['spec']['ports'][0]['port']}"

    def client(self) -> OpenAI:
        """A client that repeats nothing and waits for nothing: a failed request must show."""
        http = DefaultHttpxClient(verify=NO_AUTHORITIES)
        return OpenAI(base_url=f"{self.url()}/v1", api_key="unused", max_retries=0, timeout=120, http_client=http)

    def served(self) -> str:
        name: str = self.read()["spec"]["model"].get("servedName") or self.name
        return name

    # --- for whoever reads a failure -------------------------------------------------------------------------------

    def explain(self) -> str:
        """The model's and its pods' descriptions and the ends of their logs."""
        parts = [kubectl.describe(self.namespace, "tpm", self.name)]
        for pod in self.children("pods"):
            name = pod["metadata"]["name"]
            parts.append(kubectl.describe(self.namespace, "pod", name))
            parts.append(f"--- log of {name}\n{self.api.log(self.namespace, name, tail=40)}")
        return "\n".join([*parts, operator_log(self.api, tail=40)])


OPERATOR_NAMESPACE: Final = "lockstep-system"
OPERATOR_SELECTOR: Final = "app.kubernetes.io/component=operator"


def operator_pods(api: ClusterApi) -> list[Object]:
    """The operator's pods that are not on their way out."""
    pods = api.items("pods", OPERATOR_NAMESPACE, OPERATOR_SELECTOR)
    return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]


def operator_log(api: ClusterApi, tail: int | None = None) -> str:
    names = [pod["metadata"]["name"] for pod in operator_pods(api)]
    return "\n".join(f"--- log of {name}\n{api.log(OPERATOR_NAMESPACE, name, tail=tail)}" for name in names)
