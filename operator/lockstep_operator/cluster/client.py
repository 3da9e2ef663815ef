"""The edge to the API server: a handful of requests on plain JSON objects, by the official client's dynamic half.

Its discovery is not used: the kinds are known, so they are declared. It would ask for every API group at each start and
again whenever a kind isn't served, and keep a file of a guessable name under /tmp; a request costs the same either way.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Protocol

import aiohttp
from kubernetes.aio import client, config
from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.dynamic import DynamicClient
from kubernetes.aio.dynamic.resource import Resource

from lockstep_operator.cluster.pace import Pace
from lockstep_operator.types.names import API_VERSION, FIELD_MANAGER, KIND, PLURAL, STATUS_MANAGER, label_of
from lockstep_operator.types.observed import Object

REQUEST_SECONDS: Final = 30.0
REQUESTS_PER_SECOND: Final = 200.0
REQUESTS_AT_ONCE: Final = 400
MESSAGE_LIMIT: Final = 1000  # characters of what the API server says: it may quote a whole document
_MALFORMED: Final = ("failed to create typed patch object", "failed to convert new object")
_UNKNOWN_FIELD: Final = re.compile(r"(\.\S+?): field not declared in schema")
_KEY: Final = re.compile(r"\[[^\]]*\]")  # of an item of a list

UNLABELLED: Final = frozenset({KIND, "PodDisruptionBudget", "LimitRange"})  # watched whoever made them
PAGE: Final = 500  # objects
_METADATA_ALONE: Final = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"

RESOURCES: Final[Mapping[str, tuple[str, str]]] = {
    KIND: (API_VERSION, PLURAL),
    "StatefulSet": ("apps/v1", "statefulsets"),
    "ControllerRevision": ("apps/v1", "controllerrevisions"),
    "Service": ("v1", "services"),
    "Secret": ("v1", "secrets"),
    "ServiceAccount": ("v1", "serviceaccounts"),
    "NetworkPolicy": ("networking.k8s.io/v1", "networkpolicies"),
    "PodDisruptionBudget": ("policy/v1", "poddisruptionbudgets"),
    "Pod": ("v1", "pods"),
    "Event": ("v1", "events"),
    "LimitRange": ("v1", "limitranges"),
    "Lease": ("coordination.k8s.io/v1", "leases"),
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

    async def survey(self, kind: str, namespace: str) -> list[Object]:
        """The metadata alone of what is watched of a kind; of all namespaces if none is named."""
        ...

    async def create(self, kind: str, manifest: Mapping[str, Any]) -> Object: ...

    async def apply(self, kind: str, manifest: Mapping[str, Any]) -> Object:
        """Server-side apply: takes the fields that the manifest sets from whoever changed them."""
        ...

    async def overwrite(self, kind: str, manifest: Mapping[str, Any], uid: str) -> Object:
        """A merge patch of the spec: replaces whole lists, which an apply can't where others have added to them. A
        conflict when the object has another UID."""
        ...

    async def replace(self, kind: str, manifest: Mapping[str, Any]) -> Object:
        """The whole object. A conflict when it has another resource version than the manifest by now."""
        ...

    async def apply_status(self, kind: str, manifest: Mapping[str, Any]) -> Object:
        """A conflict when the manifest names a resource version and the object has another by now."""
        ...

    async def served_schema(self) -> Mapping[str, Any]:
        """The schemas of the API group as the API server publishes them (OpenAPI v3), by name."""
        ...

    async def delete(self, kind: str, namespace: str, name: str, uid: str = "", grace: int | None = None) -> None:
        """Delete this very object; another of the same name, or none, is left alone. Without a UID, whatever has the
        name. `grace` in seconds."""
        ...


class ApiServer:
    """A real one. It is asked for nothing while `allowed` says no."""

    def __init__(self, api_client: client.ApiClient, allowed: Callable[[], bool] = lambda: True) -> None:
        self._client = DynamicClient(api_client)
        self._allowed = allowed
        self._pace = Pace(REQUESTS_PER_SECOND, REQUESTS_AT_ONCE)
        self._of = {kind: _resource(self._client, kind) for kind in RESOURCES}

    async def get(self, kind: str, namespace: str, name: str) -> Object | None:
        try:
            return await self._ask("get", kind, name=name, namespace=namespace)
        except KubeError as error:
            if error.status == 404:
                return None
            raise

    async def find(self, kind: str, namespace: str, *, labels: str = "", fields: str = "") -> list[Object]:
        selectors = {"label_selector": labels or None, "field_selector": fields or None}
        items = (await self._ask("get", kind, namespace=namespace, **selectors)).get("items") or []
        return [{**item, "apiVersion": RESOURCES[kind][0], "kind": kind} for item in items]

    async def survey(self, kind: str, namespace: str) -> list[Object]:
        api_version, plural = RESOURCES[kind]
        place = f"/namespaces/{namespace}" if namespace else ""
        path = f"/{'apis' if '/' in api_version else 'api'}/{api_version}{place}/{plural}"
        found: list[Object] = []
        query: dict[str, Any] = {"label_selector": None if kind in UNLABELLED else label_of(kind), "limit": PAGE}
        while True:
            headers = {"Accept": _METADATA_ALONE}
            page = await self._answered(
                lambda headers=headers: self._client.request(  # type: ignore[misc]
                    "get", path, header_params=headers, query_params=[], **query, **_RAW
                )
            )
            found += [item["metadata"] for item in page.get("items") or []]
            query["_continue"] = (page.get("metadata") or {}).get("continue")
            if not query["_continue"]:
                return found

    async def create(self, kind: str, manifest: Mapping[str, Any]) -> Object:
        return await self._ask("create", kind, **_written(manifest), field_manager=FIELD_MANAGER)

    async def apply(self, kind: str, manifest: Mapping[str, Any]) -> Object:
        asked = {**_written(manifest), "field_manager": FIELD_MANAGER, "force_conflicts": True}
        return await self._ask("server_side_apply", kind, **asked)

    async def overwrite(self, kind: str, manifest: Mapping[str, Any], uid: str) -> Object:
        metadata = manifest["metadata"]
        return await self._ask(
            "patch",
            kind,
            body={"metadata": {"uid": uid}, "spec": manifest["spec"]},
            name=metadata["name"],
            namespace=metadata["namespace"],
            content_type="application/merge-patch+json",
            field_manager=FIELD_MANAGER,
        )

    async def replace(self, kind: str, manifest: Mapping[str, Any]) -> Object:
        return await self._ask("replace", kind, **_written(manifest), field_manager=FIELD_MANAGER)

    async def apply_status(self, kind: str, manifest: Mapping[str, Any]) -> Object:
        asked = {**_written(manifest), "field_manager": STATUS_MANAGER, "force_conflicts": True}
        return await self._ask_of("server_side_apply", self._of[kind].status, **asked)

    async def delete(self, kind: str, namespace: str, name: str, uid: str = "", grace: int | None = None) -> None:
        body: Object = {"propagationPolicy": "Background"}
        if uid:
            body["preconditions"] = {"uid": uid}
        if grace is not None:
            body["gracePeriodSeconds"] = grace
        try:
            await self._ask("delete", kind, name=name, namespace=namespace, body=body)
        except KubeError as error:
            if error.status not in (404, 409):  # gone already, or another by now
                raise

    async def served_schema(self) -> Mapping[str, Any]:
        document = await self.request("get", f"/openapi/v3/apis/{API_VERSION}")
        return dict((document.get("components") or {}).get("schemas") or {})

    async def request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] = MappingProxyType({}),
        body: Object | None = None,
        content: str = "application/json",
    ) -> Object:
        """What the methods above have no words for. `content` is the body's type."""
        asked = {"query_params": [*query.items()], "body": body, "content_type": content}
        return await self._answered(lambda: self._client.request(method, path, **asked, **_RAW))

    async def _ask(self, verb: str, kind: str, **asked: Any) -> Object:
        return await self._ask_of(verb, self._of[kind], **asked)

    async def _ask_of(self, verb: str, resource: Resource, **asked: Any) -> Object:
        return await self._answered(lambda: getattr(self._client, verb)(resource, **asked, **_RAW))

    async def _answered(self, ask: Callable[[], Awaitable[aiohttp.ClientResponse]]) -> Object:
        await self._pace.turn()
        if not self._allowed():
            raise KubeError(0, "NotLeading", "another operator leads, so this one asks for nothing")
        return await _answer(ask())


_RAW: Final[Mapping[str, Any]] = {"serialize": False, "_request_timeout": REQUEST_SECONDS}  # documents, not wrappers


def _resource(dynamic: DynamicClient, kind: str) -> Resource:
    api_version, plural = RESOURCES[kind]
    group, _, version = api_version.rpartition("/")
    status = {"status": {"kind": kind, "name": f"{plural}/status", "namespaced": True}}
    return Resource(
        prefix="apis" if group else "api",
        group=group,
        api_version=version,
        kind=kind,
        name=plural,
        namespaced=True,
        subresources=status,
        client=dynamic,
    )


def _written(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {"body": manifest, "namespace": manifest["metadata"]["namespace"]}


async def _answer(asked: Awaitable[aiohttp.ClientResponse]) -> Object:
    """The document. Raises KubeError."""
    try:
        text = await (await asked).read()
    except ApiException as error:
        raise _refusal(error) from error
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise KubeError(0, type(error).__name__, str(error) or "no answer from the API server") from error
    try:
        return dict(json.loads(text))
    except ValueError:
        raise KubeError(0, "NotJson", text[:200].decode(errors="replace")) from None


def _refusal(error: ApiException) -> KubeError:
    """What the API server says against it, of which the document has more than the status line."""
    text = str(error.body or "")
    try:
        document = json.loads(text)
    except ValueError:
        return KubeError(error.status or 0, "NotJson", text[:200])
    causes = (document.get("details") or {}).get("causes") or []
    reasons = tuple(str(cause.get("reason", "")) for cause in causes)
    return KubeError(error.status or 0, document.get("reason", ""), document.get("message", ""), reasons)


async def connect() -> client.ApiClient:
    """With the pod's ServiceAccount, or as KUBECONFIG says. Raises kubernetes.aio.config.ConfigException."""
    configuration = client.Configuration()
    try:
        config.load_incluster_config(client_configuration=configuration)
    except config.ConfigException:
        # Named, because the client reads the variable only when it is imported.
        await config.load_kube_config(config_file=os.environ.get("KUBECONFIG"), client_configuration=configuration)
    return client.ApiClient(configuration=configuration)
