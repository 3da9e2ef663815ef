"""The edge to the API server: a handful of requests on plain JSON objects.

The official client gives configuration, credentials and their renewal; its model classes are left aside, because what
the operator compares and applies are documents.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol
from urllib.parse import urlencode

import aiohttp
from kubernetes.aio import client, config
from kubernetes.aio.client.exceptions import ApiException

from lockstep_operator.types.names import API_VERSION, FIELD_MANAGER, KIND, PLURAL, STATUS_MANAGER
from lockstep_operator.types.observed import Object

REQUEST_SECONDS: Final = 30.0
MESSAGE_LIMIT: Final = 1000  # characters of what the API server says: it may quote a whole document
_MALFORMED: Final = ("failed to create typed patch object", "failed to convert new object")
_UNKNOWN_FIELD: Final = re.compile(r"(\.\S+?): field not declared in schema")
_KEY: Final = re.compile(r"\[[^\]]*\]")  # of an item of a list

RESOURCES: Final[Mapping[str, tuple[str, str]]] = {
    KIND: (API_VERSION, PLURAL),
    "StatefulSet": ("apps/v1", "statefulsets"),
    "Service": ("v1", "services"),
    "Secret": ("v1", "secrets"),
    "ServiceAccount": ("v1", "serviceaccounts"),
    "NetworkPolicy": ("networking.k8s.io/v1", "networkpolicies"),
    "Pod": ("v1", "pods"),
    "Event": ("v1", "events"),
    "LimitRange": ("v1", "limitranges"),
}


@dataclass(frozen=True, slots=True)
class KubeError(Exception):
    """The API server said no, or nothing at all (`status` is then 0)."""

    status: int
    reason: str
    message: str
    causes: tuple[str, ...] = ()  # the reasons among its details

    def __str__(self) -> str:
        return f"{self.reason or self.status}: {self.message[:MESSAGE_LIMIT]}"

    @property
    def transient(self) -> bool:
        """Whether the same request may succeed without anybody changing it: a quota is freed, a webhook comes back."""
        if self.malformed:
            return False
        return self.status in (0, 408, 409, 429) or self.status >= 500 or self.over_quota or self.other_object

    @property
    def other_object(self) -> bool:
        """A patch that names the object's UID met another object: it is looked at anew."""
        return self.status == 409 or (self.status == 422 and "metadata.uid" in self.message)

    @property
    def malformed(self) -> bool:
        """A server-side apply of a document that isn't of the kind's schema: the API server calls that a 500 without a
        reason (kubernetes/kubernetes#122480)."""
        return self.status == 500 and any(words in self.message for words in _MALFORMED)

    @property
    def unknown_fields(self) -> tuple[tuple[str, ...], ...]:
        """Of a document that isn't of the schema: the fields that it doesn't know, as names from the top."""
        if not self.malformed:
            return ()
        paths = _UNKNOWN_FIELD.findall(self.message)
        return tuple(tuple(_KEY.sub("", path).strip(".").split(".")) for path in paths)

    @property
    def over_quota(self) -> bool:
        return self.status == 403 and "exceeded quota" in self.message

    @property
    def namespace_ending(self) -> bool:
        """Nothing can be created any more, and everything goes, or has gone."""
        words = "because it is being terminated" in self.message
        being_deleted = self.status == 403 and ("NamespaceTerminating" in self.causes or words)
        return being_deleted or (self.status == 404 and self.message.startswith("namespaces "))

    @property
    def already_exists(self) -> bool:
        return self.status == 409 and self.reason == "AlreadyExists"


class Kube(Protocol):
    """What the operator asks of an API server. Every method may raise KubeError."""

    async def get(self, kind: str, namespace: str, name: str) -> Object | None: ...

    async def find(self, kind: str, namespace: str, *, labels: str = "", fields: str = "") -> list[Object]: ...

    async def create(self, kind: str, manifest: Mapping[str, Any]) -> Object: ...

    async def apply(self, kind: str, manifest: Mapping[str, Any]) -> Object:
        """Server-side apply: takes the fields that the manifest sets from whoever changed them."""
        ...

    async def overwrite(self, kind: str, manifest: Mapping[str, Any], uid: str) -> Object:
        """A merge patch of the spec: replaces whole lists, which an apply can't where others have added to them. A
        conflict when the object has another UID."""
        ...

    async def apply_status(self, kind: str, manifest: Mapping[str, Any]) -> Object:
        """A conflict when the manifest names a resource version and the object has another by now."""
        ...

    async def served_schema(self) -> Mapping[str, Any]:
        """The schemas of the API group as the API server publishes them (OpenAPI v3), by name."""
        ...

    async def delete(self, kind: str, namespace: str, name: str, uid: str, grace: int | None = None) -> None:
        """Delete this very object; another of the same name, or none, is left alone. `grace` in seconds."""
        ...


class ApiServer:
    """A real one."""

    def __init__(self, api_client: client.ApiClient) -> None:
        self._client = api_client

    async def get(self, kind: str, namespace: str, name: str) -> Object | None:
        try:
            return await self._request("GET", _path(kind, namespace, name))
        except KubeError as error:
            if error.status == 404:
                return None
            raise

    async def find(self, kind: str, namespace: str, *, labels: str = "", fields: str = "") -> list[Object]:
        query = {"labelSelector": labels, "fieldSelector": fields}
        items = (await self._request("GET", _path(kind, namespace), query)).get("items") or []
        return [{**item, "apiVersion": RESOURCES[kind][0], "kind": kind} for item in items]

    async def create(self, kind: str, manifest: Mapping[str, Any]) -> Object:
        path = _path(kind, manifest["metadata"]["namespace"])
        return await self._request("POST", path, {"fieldManager": FIELD_MANAGER}, manifest)

    async def apply(self, kind: str, manifest: Mapping[str, Any]) -> Object:
        return await self._apply(kind, manifest, FIELD_MANAGER, "")

    async def overwrite(self, kind: str, manifest: Mapping[str, Any], uid: str) -> Object:
        path = _path(kind, manifest["metadata"]["namespace"], manifest["metadata"]["name"])
        body = {"metadata": {"uid": uid}, "spec": manifest["spec"]}
        return await self._request("PATCH", path, {"fieldManager": FIELD_MANAGER}, body, "application/merge-patch+json")

    async def apply_status(self, kind: str, manifest: Mapping[str, Any]) -> Object:
        return await self._apply(kind, manifest, STATUS_MANAGER, "/status")

    async def delete(self, kind: str, namespace: str, name: str, uid: str, grace: int | None = None) -> None:
        body: Object = {"propagationPolicy": "Background", "preconditions": {"uid": uid}}
        if grace is not None:
            body["gracePeriodSeconds"] = grace
        try:
            await self._request("DELETE", _path(kind, namespace, name), {}, body)
        except KubeError as error:
            if error.status not in (404, 409):  # gone already, or another by now
                raise

    async def served_schema(self) -> Mapping[str, Any]:
        document = await self._request("GET", f"/openapi/v3/apis/{API_VERSION}")
        return dict((document.get("components") or {}).get("schemas") or {})

    async def _apply(self, kind: str, manifest: Mapping[str, Any], manager: str, subresource: str) -> Object:
        metadata = manifest["metadata"]
        path = _path(kind, metadata["namespace"], metadata["name"]) + subresource
        query = {"fieldManager": manager, "force": "true"}
        return await self._request("PATCH", path, query, manifest, "application/apply-patch+yaml")

    async def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
    ) -> Object:
        parameters = urlencode({name: value for name, value in (query or {}).items() if value})
        headers = {"Accept": "application/json", "Content-Type": content_type}
        try:
            request = await self._client.param_serialize(
                method,
                f"{path}?{parameters}" if parameters else path,
                header_params=headers,
                body=body,
                auth_settings=["BearerToken"],
            )
            response = await self._client.call_api(*request, _request_timeout=REQUEST_SECONDS)
            status, text = response.status, await response.read()
        except ApiException as error:
            raise KubeError(error.status or 0, error.reason or "", str(error.body or error)) from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise KubeError(0, type(error).__name__, str(error) or "no answer from the API server") from error
        return _read(status, text)


def _read(status: int, text: bytes) -> Object:
    try:
        document = json.loads(text)
    except ValueError:
        raise KubeError(status if status >= 400 else 0, "NotJson", text[:200].decode(errors="replace")) from None
    if status >= 400:
        causes = (document.get("details") or {}).get("causes") or []
        reasons = tuple(str(cause.get("reason", "")) for cause in causes)
        raise KubeError(status, document.get("reason", ""), document.get("message", ""), reasons)
    return dict(document)


def _path(kind: str, namespace: str, name: str = "") -> str:
    api_version, plural = RESOURCES[kind]
    prefix = f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"
    return f"{prefix}/namespaces/{namespace}/{plural}" + (f"/{name}" if name else "")


async def connect() -> client.ApiClient:
    """With the pod's ServiceAccount, or as KUBECONFIG says. Raises kubernetes.aio.config.ConfigException."""
    configuration = client.Configuration()
    try:
        config.load_incluster_config(client_configuration=configuration)
    except config.ConfigException:
        # Named, because the client reads the variable only when it is imported.
        await config.load_kube_config(config_file=os.environ.get("KUBECONFIG"), client_configuration=configuration)
    return client.ApiClient(configuration=configuration)
