"""The operator's edges over real HTTP: the API server's protocol, a group's status, its own port."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer
from kubernetes.aio import client
from tests.support.kube_answers import openapi_schema
from tests.support.kube_world import well

from lockstep_operator.cluster.client import ApiServer, KubeError
from lockstep_operator.cluster.served_schema import ServedSchema
from lockstep_operator.groups.status_poller import MAX_STATUS_BYTES, PollTarget, StatusPoller, significant_part
from lockstep_operator.reporting.metrics import Metrics
from lockstep_operator.server import application
from lockstep_operator.types.model_status import Condition, ModelStatus
from lockstep_operator.types.names import ModelKey
from lockstep_operator.types.observed import GroupReport
from lockstep_runtime.protocol.status import Fault, FaultRecord, GroupState, GroupStatus, Latency
from lockstep_runtime.protocol.tokens import Purpose, purpose_token

KEY = ModelKey("team", "chat")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[TestServer]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    server = TestServer(app)
    await server.start_server()
    try:
        yield server
    finally:
        await server.close()


# --- the API server ---


class Recorder:
    """Answers every request alike and keeps what was asked."""

    def __init__(self, status: int, document: object) -> None:
        self.status, self.document = status, document
        self.asked: list[tuple[str, str, dict[str, str], str, Any]] = []

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.text()
        content = request.headers.get("Content-Type", "")
        self.asked.append(
            (request.method, request.path, dict(request.query), content, json.loads(body) if body else None)
        )
        text = self.document if isinstance(self.document, str) else json.dumps(self.document)
        return web.Response(status=self.status, text=text, content_type="application/json")


@asynccontextmanager
async def api(status: int, document: object) -> AsyncIterator[tuple[ApiServer, Recorder]]:
    recorder = Recorder(status, document)
    async with serving(recorder.handle) as server:
        api_client = client.ApiClient(client.Configuration(host=str(server.make_url("")).rstrip("/")))
        yield ApiServer(api_client), recorder
        await api_client.close()


MANIFEST = {"metadata": {"name": "chat", "namespace": "team"}, "spec": {"a": 1}}


async def test_reads() -> None:
    async with api(200, {"items": [{"metadata": {"name": "chat-0"}}]}) as (kube, recorder):
        found = await kube.find("StatefulSet", "team", labels="lockstep.dev/model=chat")
        assert found == [{"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": "chat-0"}}]
        await kube.get("Service", "team", "chat")
    assert [entry[:3] for entry in recorder.asked] == [
        ("GET", "/apis/apps/v1/namespaces/team/statefulsets", {"labelSelector": "lockstep.dev/model=chat"}),
        ("GET", "/api/v1/namespaces/team/services/chat", {}),
    ]


async def test_writes() -> None:
    async with api(200, {"done": True}) as (kube, recorder):
        await kube.apply("Service", MANIFEST)
        await kube.overwrite("Service", MANIFEST, "uid-1")
        await kube.apply_status("TensorParallelModel", MANIFEST)
        await kube.create("Event", MANIFEST)
        await kube.delete("Pod", "team", "chat-0-0", "uid-1")
    services = "/api/v1/namespaces/team/services/chat"
    status = "/apis/lockstep.dev/v1alpha1/namespaces/team/tensorparallelmodels/chat/status"
    owned, force = {"fieldManager": "lockstep-operator"}, {"force": "true"}
    by_status = {"fieldManager": "lockstep-operator-status"} | force
    assert recorder.asked == [
        ("PATCH", services, owned | force, "application/apply-patch+yaml", MANIFEST),
        ("PATCH", services, owned, "application/merge-patch+json",
         {"metadata": {"uid": "uid-1"}, "spec": {"a": 1}}),
        ("PATCH", status, by_status, "application/apply-patch+yaml", MANIFEST),
        ("POST", "/api/v1/namespaces/team/events", owned, "application/json", MANIFEST),
        ("DELETE", "/api/v1/namespaces/team/pods/chat-0-0", {}, "application/json",
         {"propagationPolicy": "Background", "preconditions": {"uid": "uid-1"}}),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("status", "reason", "transient"),
    [
        (403, "Forbidden", False),
        (422, "Invalid", False),
        (409, "Conflict", True),
        (429, "TooManyRequests", True),
        (500, "", True),
        (500, "InternalError", True),
    ],
)
async def test_what_the_api_server_says_against_it(status: int, reason: str, transient: bool) -> None:
    async with api(status, {"reason": reason, "message": "no"}) as (kube, _):
        with pytest.raises(KubeError) as raised:
            await kube.apply("Service", MANIFEST)
    assert (raised.value.status, raised.value.reason, raised.value.message, raised.value.transient) == (
        status,
        reason,
        "no",
        transient,
    )


TYPED = "failed to create typed patch object (team/chat-0; apps/v1, Kind=StatefulSet): "


@pytest.mark.parametrize(
    ("status", "document", "transient"),
    [
        (500, {"message": TYPED + ".spec.template.spec.nodeSelectr: field not declared in schema"}, False),
        (500, {"message": TYPED + ".spec.template.spec.nodeSelector: expected map, got &{x}"}, False),
        (
            500,
            {"message": "failed to convert new object (team/chat-0; apps/v1, Kind=StatefulSet) to proper version"},
            False,
        ),
        (500, {"message": 'Internal error occurred: failed calling webhook "no.dev"', "reason": "InternalError"}, True),
        (403, {"message": "is forbidden: exceeded quota: q, requested: pods=1", "reason": "Forbidden"}, True),
        (422, {"message": 'Service "s" is invalid: metadata.uid: Invalid value: "1": field is immutable'}, True),
        (
            422,
            {"message": "is forbidden: ValidatingAdmissionPolicy 'p' denied request: no", "reason": "Invalid"},
            False,
        ),
    ],
)
async def test_what_may_pass_by_itself(status: int, document: dict[str, str], transient: bool) -> None:
    async with api(status, document) as (kube, _):
        with pytest.raises(KubeError) as raised:
            await kube.apply("Service", MANIFEST)
    assert raised.value.transient is transient


async def test_fields_that_a_schema_lacks_are_read_from_the_answer() -> None:
    words = TYPED + "errors:\n  .status.groups[group=0].ranks[rank=1].newer: field not declared in schema\n"
    words += '  .status.conditions[type="a.b"].x: field not declared in schema'
    async with api(500, {"message": words}) as (kube, _):
        with pytest.raises(KubeError) as raised:
            await kube.apply_status("TensorParallelModel", MANIFEST)
    assert raised.value.unknown_fields == (("status", "groups", "ranks", "newer"), ("status", "conditions", "x"))


async def test_a_namespace_that_is_being_deleted_is_known_by_its_cause() -> None:
    causes = {"causes": [{"reason": "NamespaceTerminating"}]}
    async with api(403, {"reason": "Forbidden", "message": "no", "details": causes}) as (kube, _):
        with pytest.raises(KubeError) as raised:
            await kube.apply("Service", MANIFEST)
    assert raised.value.namespace_ending


async def test_the_served_schema_is_compared_with_what_is_written() -> None:
    schema = ServedSchema()
    async with api(200, {"components": {"schemas": {"a": {}, "b": openapi_schema(["status.groups.epoch"])}}}) as (
        kube,
        log,
    ):
        schema.learn(await kube.served_schema())
    assert log.asked[0][1] == "/openapi/v3/apis/lockstep.dev/v1alpha1"
    assert "it lacks status.groups.epoch: apply the CRD of this version" in schema.problem
    assert schema.fitting({"groups": [{"group": 0, "epoch": 1}]}) == {"groups": [{"group": 0}]}
    schema.learn({"b": openapi_schema([])})
    assert (schema.problem, schema.lacking) == ("", 0)


async def test_what_is_not_there_is_none_and_deleting_it_is_no_error() -> None:
    async with api(404, {"reason": "NotFound"}) as (kube, _):
        assert await kube.get("Service", "team", "chat") is None
        await kube.delete("Pod", "team", "chat-0-0", "uid-1")
    async with api(409, {"reason": "Conflict"}) as (kube, _):
        await kube.delete("Pod", "team", "chat-0-0", "uid-of-another")


async def test_no_answer_and_no_json_are_told_as_such() -> None:
    async with api(200, "<html>") as (kube, _):
        with pytest.raises(KubeError, match="NotJson"):
            await kube.get("Service", "team", "chat")
    async with client.ApiClient(client.Configuration(host="http://127.0.0.1:1")) as api_client:
        with pytest.raises(KubeError) as raised:
            await ApiServer(api_client).get("Service", "team", "chat")
        assert raised.value.transient


# --- a group's status ---


class Changes:
    """What the group client asked for, waited for with a deadline."""

    def __init__(self) -> None:
        self.asked: asyncio.Queue[float] = asyncio.Queue()

    def __call__(self, key: ModelKey, seconds: float) -> None:
        assert key == KEY
        self.asked.put_nowait(seconds)

    async def next(self) -> float:
        async with asyncio.timeout(10):
            return await self.asked.get()


def target(server: TestServer, uid: str = "uid-1") -> PollTarget:
    assert server.port is not None
    return PollTarget(pod_uid=uid, address="127.0.0.1", token="secret", port=server.port)


async def test_a_status_is_asked_for_with_the_token_and_then_only_its_changes() -> None:
    asked: list[tuple[str, str]] = []
    changed = asyncio.Event()
    first = well(KEY, 0, "inc", "new")
    slower = msgspec.structs.replace(first, revision=2, step_latency=Latency(p50_ms=5.0))
    broken = msgspec.structs.replace(slower, revision=3, state=GroupState.RECOVERING)

    async def status(request: web.Request) -> web.Response:
        asked.append((request.headers["Authorization"], request.query.get("after", "")))
        if len(asked) == 4:
            await changed.wait()
        return web.Response(body=msgspec.json.encode([first, slower, broken, broken][len(asked) - 1]))

    changes, groups = Changes(), None
    async with serving(status) as server:
        groups = StatusPoller(changes, lambda: 0.0)
        groups.watch(KEY, {0: target(server)})
        assert [await changes.next(), await changes.next(), await changes.next()] == [0.0, 0.0, 0.0], "first, measured"
        reports = groups.reports(KEY, {0: "uid-1"})
        assert reports[0].status == broken
        assert groups.reports(KEY, {0: "another pod"}) == {}, "never the words of a pod that is gone"
        groups.watch(KEY, {})
        assert groups.reports(KEY, {0: "uid-1"}) == {}
        changed.set()
        await groups.close()
    reader = f"Bearer {purpose_token('secret', Purpose.STATUS)}"
    assert asked[:3] == [(reader, ""), (reader, "inc/1"), (reader, "inc/2")]


async def test_a_new_fault_is_told_at_once_and_only_once() -> None:
    first = well(KEY, 0, "inc", "new")
    fault = FaultRecord(id=1, fault=Fault.HANG, rank=1, message="it hangs", at=1.0, epoch=1)
    hanging = msgspec.structs.replace(first, revision=2, state=GroupState.RECOVERING, faults=[fault])
    loading = msgspec.structs.replace(hanging, revision=3, state=GroupState.LOADING)
    poisoned = msgspec.structs.replace(loading, revision=4, state=GroupState.POISONED)
    answers, told, asked = [first, hanging, loading, poisoned], list[int](), list[str]()

    async def status(request: web.Request) -> web.Response:
        asked.append(request.query.get("after", ""))
        if len(asked) > len(answers):
            await asyncio.Event().wait()
        return web.Response(body=msgspec.json.encode(answers[len(asked) - 1]))

    async with serving(status) as server:
        changes = Changes()
        groups = StatusPoller(changes, lambda: 0.0, alarmed=lambda key: told.append(len(asked)))
        groups.watch(KEY, {0: target(server)})
        for _ in answers:
            await changes.next()
        await groups.close()
    assert told == [2, 4], "the fault, and that the group can't repair it"


async def test_a_pod_that_refuses_the_token_is_known_to_be_alive_and_asked_until_it_takes_it() -> None:
    refuses = True

    async def status(request: web.Request) -> web.Response:
        if refuses:
            return web.Response(status=401)
        return web.Response(body=msgspec.json.encode(well(KEY, 0, "inc", "new")))

    changes = Changes()
    async with serving(status) as server:
        groups = StatusPoller(changes, lambda: 7.0)
        groups.watch(KEY, {0: target(server)})
        assert await changes.next() > 180, "the kubelet may still bring it the right one"
        assert groups.reports(KEY, {0: "uid-1"})[0] == GroupReport(
            unreachable_since=7.0, error="it doesn't take the operator's token", refused=True
        )
        refuses = False
        assert await changes.next() == 0.0
        found = groups.reports(KEY, {0: "uid-1"})[0]
        assert (found.refused, found.unreachable_since) == (False, None)
        await groups.close()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (web.Response(status=403), "status 403"),
        (web.Response(text="[]"), "Expected `object`"),
        (web.Response(text="nonsense"), "JSON is malformed"),
    ],
)
async def test_a_group_that_can_not_be_asked_is_tried_again(answer: web.Response, words: str) -> None:
    well_again = asyncio.Event()

    async def status(request: web.Request) -> web.Response:
        if well_again.is_set():
            return web.Response(body=msgspec.json.encode(well(KEY, 0, "inc", "new")))
        return web.Response(status=answer.status, body=answer.body)

    changes = Changes()
    groups = StatusPoller(changes, lambda: 7.0)
    async with serving(status) as server:
        groups.watch(KEY, {0: target(server)})
        assert await changes.next() == 31.0, "only a long silence is worth a look"
        report = groups.reports(KEY, {0: "uid-1"})[0]
        assert report.unreachable_since == 7.0
        assert words in report.error
        well_again.set()
        assert await changes.next() == 0.0
        assert groups.reports(KEY, {0: "uid-1"})[0].unreachable_since is None
        await groups.close()


async def test_an_answer_without_end_is_cut_off_whatever_its_headers_say() -> None:
    sent = 0

    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        answer = web.StreamResponse()
        answer.enable_chunked_encoding()
        await answer.prepare(request)
        while sent < 16 * MAX_STATUS_BYTES:
            await answer.write(b" " * 65536)
            sent += 65536
        return answer

    changes = Changes()
    groups = StatusPoller(changes, lambda: 7.0)
    async with serving(endless) as server:
        groups.watch(KEY, {0: target(server)})
        await changes.next()
        assert "bytes are too many for a status" in groups.reports(KEY, {0: "uid-1"})[0].error
        await groups.close()
    assert sent < 8 * MAX_STATUS_BYTES


async def test_a_group_is_fenced_and_freed_as_its_target_says() -> None:
    fenced, asked, changed = False, list[str](), asyncio.Event()

    async def answer(request: web.Request) -> web.Response:
        nonlocal fenced
        purpose = Purpose.FENCE if request.path == "/fence" else Purpose.STATUS
        assert request.headers["Authorization"] == f"Bearer {purpose_token('secret', purpose)}"
        if request.path == "/fence":
            asked.append(request.method)
            fenced = request.method == "PUT"
            return web.Response()
        if len(asked) == 2:
            changed.set()
        status = msgspec.structs.replace(well(KEY, 0, "inc", "new"), fenced=fenced)
        return web.Response(body=msgspec.json.encode(status))

    changes = Changes()
    groups = StatusPoller(changes, lambda: 0.0)
    async with serving(answer) as server:
        of = target(server)
        groups.watch(KEY, {0: replace(of, fenced=True)})
        while not (status := groups.reports(KEY, {0: "uid-1"}).get(0)) or not status.status or not status.status.fenced:
            await changes.next()
        groups.watch(KEY, {0: of})
        async with asyncio.timeout(10):
            await changed.wait()
        await groups.close()
    assert asked == ["PUT", "DELETE"]


async def test_a_bug_in_taking_a_status_is_told_and_the_group_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    answers, failing = 0, True

    async def status(request: web.Request) -> web.Response:
        nonlocal answers
        answers += 1
        return web.Response(body=msgspec.json.encode(well(KEY, 0, f"inc-{answers}", "new")))

    def heard(key: ModelKey, group: int, status: GroupStatus) -> None:
        if failing:
            raise ZeroDivisionError("a bug")

    changes = Changes()
    groups = StatusPoller(changes, lambda: 7.0, heard)
    async with serving(status) as server:
        groups.watch(KEY, {0: target(server)})
        await changes.next()
        assert groups.reports(KEY, {0: "uid-1"})[0].error == "a bug"
        assert any(record.exc_info for record in caplog.records), "with its traceback"
        failing = False
        assert await changes.next() == 0.0
        assert groups.reports(KEY, {0: "uid-1"})[0].unreachable_since is None
        await groups.close()


def test_measurements_are_not_lasting_and_states_are() -> None:
    status = well(KEY, 0, "inc", "new")
    measured = msgspec.structs.replace(status, revision=9, requests_running=3, last_step_at=5.0)
    assert significant_part(status) == significant_part(measured)
    assert significant_part(status) != significant_part(msgspec.structs.replace(status, epoch=2))


# --- the operator's own port ---


async def test_its_own_port() -> None:
    metrics, unready = Metrics(), "models aren't watched yet"
    server = TestServer(application(metrics, lambda: unready))
    await server.start_server()
    try:
        async with ClientSession(server.make_url("")) as session:
            assert (await session.get("/healthz")).status == 200
            answer = await session.get("/readyz")
            assert (answer.status, await answer.text()) == (503, "models aren't watched yet\n")
            unready = ""
            assert (await session.get("/readyz")).status == 200
            ready = Condition(type="Ready", status="True", reason="Ready", message="", last_transition_time=1.0)
            metrics.model(KEY, ModelStatus(conditions=(ready,), replicas=2, ready_replicas=1))
            page = await (await session.get("/metrics")).text()
            assert 'lockstep_operator_models{state="Ready"} 1.0' in page
            assert "lockstep_operator_groups_ready 1.0" in page
            metrics.forget(KEY)
            assert 'lockstep_operator_models{state="Ready"} 0.0' in await (await session.get("/metrics")).text()
    finally:
        await server.close()
