"""The cluster as the plugin's user sees it: by kubeconfig, or by the ServiceAccount of the pod that it runs in.

What a group alone knows is asked inside its first pod (`exec`, as `kubectl exec` does): neither a NetworkPolicy nor the
group's token nor an API key is in the way, and none of them leaves the pod.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import aiohttp
from kubernetes.aio import client, config
from kubernetes.aio.stream import WsApiClient

from lockstep_operator.cluster.client import ApiServer
from lockstep_operator.types.names import CONTAINER, KIND, PLURAL, ModelKey
from lockstep_operator.types.observed import Object

EXEC_SECONDS: Final = 30.0
_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_CLOSED: Final = (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSING, aiohttp.WSMsgType.CLOSED)
_OUT, _ERROR_OUT, _END = 1, 2, 3  # channels of v4.channel.k8s.io
DRY_RUN: Final = {"dryRun": "All", "fieldValidation": "Strict", "fieldManager": "kubectl-lockstep"}


class PluginError(Exception):
    """What the user is told, as a sentence."""


@dataclass(frozen=True, slots=True)
class Session:
    kube: ApiServer
    api: client.ApiClient
    namespace: str

    async def model(self, name: str) -> Object:
        """Raises PluginError when there is none."""
        found = await self.kube.get(KIND, self.namespace, name)
        if found is None:
            raise PluginError(f"there is no TensorParallelModel {ModelKey(self.namespace, name)}")
        return found

    async def execute(self, pod: str, command: Sequence[str], seconds: float = EXEC_SECONDS) -> str:
        """The command's stdout, from the pod's container of the ranks. Raises PluginError with the end of its stderr
        when it fails, when it takes longer, and when it may not be run."""
        sockets = WsApiClient(self.api.configuration)
        try:
            asked = client.CoreV1Api(sockets).connect_get_namespaced_pod_exec_without_preload_content(
                pod, self.namespace, command=[*command], container=CONTAINER, stdout=True, stderr=True
            )
            async with _deadline(seconds, pod), await asked as socket:
                return await _output(socket, f"{command[0]} in pod {pod}")
        except aiohttp.WSServerHandshakeError as error:
            words = {403: "you may not exec into pods there (get and create of pods/exec)", 404: "there is no such pod"}
            why = words.get(error.status, f"the API server answers {error.status}: {error.message}")
            raise PluginError(f"can't run {command[0]} in pod {self.namespace}/{pod}: {why}") from error
        except (aiohttp.ClientError, OSError) as error:
            raise PluginError(f"can't run {command[0]} in pod {self.namespace}/{pod}: {error}") from error
        finally:
            await sockets.close()

    async def try_model(self, manifest: Object, live: Object | None) -> Object:
        """The model as the API server would store it; nothing is stored. Raises KubeError with its refusal."""
        metadata = manifest["metadata"]
        path = f"/apis/{manifest['apiVersion']}/namespaces/{metadata['namespace']}/{PLURAL}"
        if live is None:
            return await self.kube.request("post", path, DRY_RUN, manifest)
        version = {"resourceVersion": live["metadata"]["resourceVersion"]}
        body = {**manifest, "metadata": {**metadata, **version}}
        return await self.kube.request("put", f"{path}/{metadata['name']}", DRY_RUN, body)

    async def try_pod(self, manifest: Object) -> None:
        """Whether the API server would take this pod; none is made. Raises KubeError with its refusal."""
        path = f"/api/v1/namespaces/{manifest['metadata']['namespace']}/pods"
        await self.kube.request("post", path, DRY_RUN, manifest)


@asynccontextmanager
async def _deadline(seconds: float, pod: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise PluginError(f"pod {pod} has not answered within {seconds:g} s") from None


async def _output(socket: aiohttp.ClientWebSocketResponse, what: str) -> str:
    said: dict[int, bytes] = {_OUT: b"", _ERROR_OUT: b"", _END: b""}
    async for message in socket:
        if message.type in _CLOSED:
            break
        data = message.data if isinstance(message.data, bytes) else str(message.data).encode()
        if data:
            said[data[0]] = said.get(data[0], b"") + data[1:]
    if not said[_END]:
        raise PluginError(f"{what} was cut off")
    end = json.loads(said[_END])
    if end.get("status") == "Success":
        return said[_OUT].decode(errors="replace")
    words = said[_ERROR_OUT].decode(errors="replace").strip().splitlines() or [end.get("message", "")]
    raise PluginError(f"{what} failed: {words[-1]}")


@asynccontextmanager
async def connected(kubeconfig: str | None, context: str | None, namespace: str | None) -> AsyncIterator[Session]:
    """Raises PluginError when there is neither a kubeconfig nor a pod's ServiceAccount."""
    configuration = client.Configuration()
    try:
        own = await _configure(configuration, kubeconfig or os.environ.get("KUBECONFIG"), context)
    except (config.ConfigException, OSError) as error:
        raise PluginError(f"no cluster to ask: {error}") from error
    api = client.ApiClient(configuration)
    try:
        yield Session(ApiServer(api), api, namespace or own)
    finally:
        await api.close()


async def _configure(configuration: client.Configuration, file: str | None, context: str | None) -> str:
    """Returns the namespace that is meant when none is named."""
    if not file and not context and (_ACCOUNT / "token").exists():
        config.load_incluster_config(client_configuration=configuration)
        return (_ACCOUNT / "namespace").read_text().strip()
    await config.load_kube_config(config_file=file, context=context, client_configuration=configuration)
    contexts, current = config.list_kube_config_contexts(file)
    chosen = next((one for one in contexts if one["name"] == context), current) if context else current
    return str(chosen["context"].get("namespace") or "default")
