"""How the plugin speaks with an API server: kubeconfig, exec over v4.channel.k8s.io, dry runs, refusals."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web
from tests.support.ports import free_port

from lockstep_operator.cluster.client import KubeError
from lockstep_operator.plugin.session import PluginError, Session, connected

SUCCESS = {"metadata": {}, "status": "Success"}
OUT, ERROR_OUT, END = 1, 2, 3


def failure(code: int) -> dict[str, Any]:
    causes = [{"reason": "ExitCode", "message": str(code)}]
    message = f"command terminated with non-zero exit code: exit status {code}"
    return {"status": "Failure", "reason": "NonZeroExitCode", "message": message, "details": {"causes": causes}}


class ApiServer:
    """Answers as a real one does; `frames` are what the container sends: channel and bytes."""

    def __init__(self) -> None:
        self.frames: Sequence[tuple[int, bytes]] = ()
        self.refuse = 0
        self.asked: list[tuple[str, str, dict[str, list[str]], Any]] = []
        self.tokens: list[str] = []

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/api/v1/namespaces/{namespace}/pods/{pod}/exec", self._exec)
        app.router.add_route("*", "/{path:.*}", self._rest)
        return app

    def _note(self, request: web.Request, body: Any) -> None:
        query = {name: request.query.getall(name) for name in request.query}
        self.asked.append((request.method, request.path, query, body))
        self.tokens.append(request.headers.get("Authorization", ""))

    async def _exec(self, request: web.Request) -> web.StreamResponse:
        self._note(request, None)
        if self.refuse:
            return web.json_response({"kind": "Status", "status": "Failure", "code": self.refuse}, status=self.refuse)
        socket = web.WebSocketResponse(protocols=("v4.channel.k8s.io",))
        await socket.prepare(request)
        for channel, data in self.frames:
            await socket.send_bytes(bytes([channel]) + data)
        await socket.close()
        return socket

    async def _rest(self, request: web.Request) -> web.Response:
        body = await request.json() if request.can_read_body else None
        self._note(request, body)
        if self.refuse:
            refusal = {"kind": "Status", "status": "Failure", "code": self.refuse, "message": "no, since so"}
            return web.json_response(refusal, status=self.refuse)
        return web.json_response(body or {"items": []})


@pytest.fixture
async def server() -> AsyncIterator[tuple[ApiServer, int]]:
    answers, port = ApiServer(), free_port()
    runner = web.AppRunner(answers.app())
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    yield answers, port
    await runner.cleanup()


@pytest.fixture
async def session(server: tuple[ApiServer, int], tmp_path: Path) -> AsyncIterator[Session]:
    async with connected(str(kubeconfig(tmp_path, server[1])), None, None) as found:
        yield found


def kubeconfig(folder: Path, port: int) -> Path:
    """With two contexts; the current one has a namespace."""
    cluster = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}
    contexts = [
        {"name": "one", "context": {"cluster": "c", "user": "u", "namespace": "team"}},
        {"name": "other", "context": {"cluster": "c", "user": "u"}},
    ]
    document = {
        "apiVersion": "v1", "kind": "Config", "clusters": [cluster], "contexts": contexts, "current-context": "one",
        "users": [{"name": "u", "user": {"token": "mine"}}],
    }  # fmt: skip
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump(document))
    return path


async def test_a_command_runs_in_the_ranks_container(server: tuple[ApiServer, int], session: Session) -> None:
    answers = server[0]
    answers.frames = [(OUT, b""), (OUT, b"one\ntw"), (ERROR_OUT, b"hm"), (OUT, "o ü".encode()), (END, pack(SUCCESS))]
    assert await session.execute("chat-0-0", ["lockstep", "inject", "hang", "--rank=1"]) == "one\ntwo ü"
    [(_, path, query, _)] = answers.asked
    assert path == "/api/v1/namespaces/team/pods/chat-0-0/exec"
    assert query["command"] == ["lockstep", "inject", "hang", "--rank=1"]
    assert query["container"] == ["lockstep"]
    assert answers.tokens == ["Bearer mine"]


async def test_a_command_that_fails_is_told_by_its_last_words(server: tuple[ApiServer, int], session: Session) -> None:
    server[0].frames = [(ERROR_OUT, b"Traceback\n  ...\nURLError: refused\n"), (END, pack(failure(1)))]
    with pytest.raises(PluginError, match=r"^python3 in pod chat-0-0 failed: URLError: refused$"):
        await session.execute("chat-0-0", ["python3", "-c", "pass"])


async def test_an_answer_that_is_cut_off_is_none(server: tuple[ApiServer, int], session: Session) -> None:
    server[0].frames = [(OUT, b"half of i")]
    with pytest.raises(PluginError, match="was cut off"):
        await session.execute("chat-0-0", ["python3"])


@pytest.mark.parametrize(("status", "words"), [(403, "may not exec into pods"), (404, "no such pod"), (500, "500")])
async def test_who_may_not_is_told(status: int, words: str, server: tuple[ApiServer, int], session: Session) -> None:
    server[0].refuse = status
    with pytest.raises(PluginError, match=words):
        await session.execute("chat-0-0", ["python3"])


async def test_a_model_is_tried_and_not_stored(server: tuple[ApiServer, int], session: Session) -> None:
    manifest = {
        "apiVersion": "lockstep.dev/v1beta1", "kind": "TensorParallelModel",
        "metadata": {"name": "chat", "namespace": "team"}, "spec": {},
    }  # fmt: skip
    await session.try_model(manifest, None)
    await session.try_model(manifest, {"metadata": {"resourceVersion": "7"}})
    await session.try_pod({"metadata": {"name": "chat-plan", "namespace": "team"}})
    asked = server[0].asked
    path = "/apis/lockstep.dev/v1beta1/namespaces/team/tensorparallelmodels"
    assert [(method, at) for method, at, _, _ in asked] == [
        ("POST", path), ("PUT", f"{path}/chat"), ("POST", "/api/v1/namespaces/team/pods"),
    ]  # fmt: skip
    assert all(query["dryRun"] == ["All"] and query["fieldValidation"] == ["Strict"] for _, _, query, _ in asked)
    assert asked[1][3]["metadata"]["resourceVersion"] == "7"


async def test_a_refusal_is_in_the_api_servers_words(server: tuple[ApiServer, int], session: Session) -> None:
    server[0].refuse = 422
    with pytest.raises(KubeError, match="no, since so"):
        await session.try_pod({"metadata": {"name": "chat-plan", "namespace": "team"}})


async def test_the_namespace_is_the_contexts_unless_it_is_named(server: tuple[ApiServer, int], tmp_path: Path) -> None:
    file = str(kubeconfig(tmp_path, server[1]))
    found = []
    for context, namespace in ((None, None), ("other", None), ("other", "mine")):
        async with connected(file, context, namespace) as session:
            found.append(session.namespace)
    assert found == ["team", "default", "mine"]


def pack(document: dict[str, Any]) -> bytes:
    return json.dumps(document).encode()
