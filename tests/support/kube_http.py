"""The fake API server behind HTTP, as far as kopf and the operator's client need one: discovery, lists, watches."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import yaml
from aiohttp import web
from aiohttp.test_utils import TestServer
from tests.support.kube_fake import FakeKube, clone

from lockstep_operator.cluster.client import RESOURCES, KubeError
from lockstep_operator.types.observed import Object

WATCH_SECONDS: Final = 0.02  # between two looks for news
KINDS: Final = {plural: kind for kind, (_, plural) in RESOURCES.items()}
# That kopf asks for before it begins, whether it is to look at them or not.
DISCOVERED: Final = {
    **RESOURCES,
    "Namespace": ("v1", "namespaces"),
    "CustomResourceDefinition": ("apiextensions.k8s.io/v1", "customresourcedefinitions"),
}


class KubeHttp:
    """`kube` holds the objects. `asked` counts what came: method, kind."""

    def __init__(self, kube: FakeKube) -> None:
        self.kube = kube
        self.asked = Counter[tuple[str, str]]()
        self._watches: list[asyncio.Event] = []

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/api", _versions)
        app.router.add_get("/apis", _groups)
        app.router.add_get("/openapi/v3/apis/{group}/{version}", self._schema)
        for prefix in ("/api/{version}", "/apis/{group}/{version}"):
            app.router.add_get(prefix, _resources)
            app.router.add_get(prefix + "/{plural}", self._read)
            app.router.add_get(prefix + "/namespaces/{namespace}/{plural}", self._read)
            app.router.add_post(prefix + "/namespaces/{namespace}/{plural}", self._write)
            app.router.add_route("*", prefix + "/namespaces/{namespace}/{plural}/{name}", self._one)
            app.router.add_patch(prefix + "/namespaces/{namespace}/{plural}/{name}/status", self._write)
        return app

    def break_watches(self) -> None:
        """Each ends with `410 Gone`, after which kopf lists anew."""
        for broken in self._watches:
            broken.set()

    # --- reads ---

    async def _one(self, request: web.Request) -> web.Response:
        if request.method != "GET":
            return await self._write(request)
        kind = self._count(request)
        found = await self.kube.get(kind, request.match_info["namespace"], request.match_info["name"])
        return web.json_response(found) if found else _refused(KubeError(404, "NotFound", "there is none"))

    async def _read(self, request: web.Request) -> web.StreamResponse:
        kind = KINDS.get(request.match_info["plural"])
        if kind is None:
            return _refused(KubeError(404, "NotFound", "the server could not find the requested resource"))
        if request.query.get("watch") == "true":
            return await self._watch(request, kind)
        self._count(request)
        items = [clone(item) for item in self._selected(request, kind)]
        return web.json_response({"kind": f"{kind}List", "apiVersion": RESOURCES[kind][0], "items": items,
                                  "metadata": {"resourceVersion": "1"}})  # fmt: skip

    async def _watch(self, request: web.Request, kind: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        broken, seen = asyncio.Event(), dict[str, Object]()
        self._watches.append(broken)
        try:
            while not broken.is_set():
                for event in self._news(request, kind, seen):
                    await response.write(json.dumps(event).encode() + b"\n")
                await asyncio.sleep(WATCH_SECONDS)
            gone = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
            await response.write(json.dumps({"type": "ERROR", "object": gone}).encode() + b"\n")
        finally:
            self._watches.remove(broken)
        return response

    def _news(self, request: web.Request, kind: str, seen: dict[str, Object]) -> Iterator[Object]:
        """Since the last time. What has left the selector is gone for the watch."""
        now = {item["metadata"]["uid"]: item for item in self._selected(request, kind)}
        for uid in seen.keys() - now.keys():
            yield {"type": "DELETED", "object": seen.pop(uid)}
        for uid, item in now.items():
            if seen.get(uid) != item:
                type_ = "MODIFIED" if uid in seen else "ADDED"
                seen[uid] = clone(item)
                document = {**seen[uid], "kind": kind, "apiVersion": RESOURCES[kind][0]}
                yield {"type": type_, "object": document}

    def _selected(self, request: web.Request, kind: str) -> Iterator[Object]:
        namespace, selector = request.match_info.get("namespace"), request.query.get("labelSelector", "")
        name, _, value = selector.partition("=")
        for item in self.kube.of_kind(kind):
            labels = item["metadata"].get("labels") or {}
            if namespace not in (None, item["metadata"]["namespace"]):
                continue
            if not name or (name in labels and value in ("", labels[name])):
                yield item

    async def _schema(self, request: web.Request) -> web.Response:
        return web.json_response({"components": {"schemas": await self.kube.served_schema()}})

    # --- writes ---

    async def _write(self, request: web.Request) -> web.Response:
        kind, text = self._count(request), await request.text()
        body: Any = json.loads(text) if text else {}
        try:
            return web.json_response(await self._written(request, kind, body))
        except KubeError as error:
            return _refused(error)

    async def _written(self, request: web.Request, kind: str, body: Any) -> Object:
        place = request.match_info
        if request.method == "POST":
            return await self.kube.create(kind, body)
        if request.method == "PUT":
            return await self.kube.replace(kind, body)
        if request.method == "DELETE":
            uid = body["preconditions"]["uid"]
            await self.kube.delete(kind, place["namespace"], place["name"], uid, body.get("gracePeriodSeconds"))
            return {}
        if request.path.endswith("/status"):
            return await self.kube.apply_status(kind, body)
        if request.content_type == "application/apply-patch+yaml":
            return await self.kube.apply(kind, body)
        manifest = {"metadata": {"namespace": place["namespace"], "name": place["name"]}, "spec": body["spec"]}
        return await self.kube.overwrite(kind, manifest, body["metadata"]["uid"])

    def _count(self, request: web.Request) -> str:
        kind = KINDS[request.match_info["plural"]]
        self.asked[request.method, kind] += 1
        return kind


@asynccontextmanager
async def serving_kube(kube: FakeKube, folder: Path) -> AsyncIterator[tuple[KubeHttp, Path]]:
    """The server, and a kubeconfig that leads to it."""
    made = KubeHttp(kube)
    server = TestServer(made.application())
    await server.start_server(shutdown_timeout=0.1)
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "fake",
        "clusters": [{"name": "fake", "cluster": {"server": str(server.make_url("")).rstrip("/")}}],
        "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "nobody"}}],
        "users": [{"name": "nobody", "user": {"token": "unused"}}],
    }  # fmt: skip
    kubeconfig = folder / "kubeconfig"
    kubeconfig.write_text(yaml.safe_dump(config))
    try:
        yield made, kubeconfig
    finally:
        await server.close()


async def _versions(request: web.Request) -> web.Response:
    return web.json_response({"kind": "APIVersions", "versions": ["v1"]})


async def _groups(request: web.Request) -> web.Response:
    found = {version.partition("/")[::2] for version, _ in DISCOVERED.values() if "/" in version}
    versions = [(group, {"groupVersion": f"{group}/{version}", "version": version}) for group, version in sorted(found)]
    groups = [{"name": group, "versions": [version], "preferredVersion": version} for group, version in versions]
    return web.json_response({"kind": "APIGroupList", "groups": groups})


async def _resources(request: web.Request) -> web.Response:
    group, version = request.match_info.get("group"), request.match_info["version"]
    api_version = f"{group}/{version}" if group else version
    cluster_wide = ("Namespace", "CustomResourceDefinition")
    found = [
        {"name": plural, "singularName": kind.lower(), "kind": kind, "namespaced": kind not in cluster_wide,
         "verbs": ["get", "list", "watch", "create", "patch", "delete"]}
        for kind, (its_version, plural) in DISCOVERED.items()
        if its_version == api_version
    ]  # fmt: skip
    return web.json_response({"kind": "APIResourceList", "groupVersion": api_version, "resources": found})


def _refused(error: KubeError) -> web.Response:
    document = {"kind": "Status", "status": "Failure", "reason": error.reason, "message": error.message,
                "code": error.status}  # fmt: skip
    return web.json_response(document, status=error.status)
