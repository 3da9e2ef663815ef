"""The operator under kopf, over real HTTP, against the fake API server: its watches and indexes are kopf's own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from kopf.testing import KopfRunner
from tests.support.kube_fake import FakeKube, clone, resource
from tests.support.kube_http import KubeHttp, serving_kube
from tests.support.kube_world import KEY

from lockstep_operator import handlers
from lockstep_operator.__main__ import Work
from lockstep_operator.cluster.client import ApiServer, connect
from lockstep_operator.cluster.indexes import INDEXED, Indexes
from lockstep_operator.cluster.namespaces import Namespaces
from lockstep_operator.cluster.served_schema import ServedSchema
from lockstep_operator.reporting.metrics import Metrics
from lockstep_operator.settings import Settings
from lockstep_operator.types.names import KIND, ModelKey

SETTINGS = Settings(runtime_image="runtime:1", operator_namespace="lockstep-system", resync_seconds=0.2)
SECONDS = 20.0
CHILDREN = {
    ("Secret", "chat-token"), ("Secret", "chat-operator"), ("ServiceAccount", "chat-ranks"), ("Service", "chat"),
    ("PodDisruptionBudget", "chat"),
}  # fmt: skip


class Operator:
    """One that runs in a thread of its own; `metrics` are its."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.told: list[ModelKey] = []

    @asynccontextmanager
    async def work(self, indexes: Indexes) -> AsyncIterator[handlers.Changed]:
        api_client = await connect()
        kube = ApiServer(api_client)
        work = Work(SETTINGS, kube, KEY, ServedSchema(), self.metrics, Namespaces((), kube, self.metrics))
        async with work(indexes) as changed:

            def tell(key: ModelKey) -> None:
                self.told.append(key)
                changed(key)

            yield tell
        await api_client.close()

    @property
    def quiet_passes(self) -> float:
        return self.metrics.registry.get_sample_value("lockstep_operator_reconciles_total", {"result": "quiet"}) or 0.0


@asynccontextmanager
async def running(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *models: str
) -> AsyncIterator[tuple[FakeKube, KubeHttp, Operator]]:
    kube, operator = FakeKube(time.time), Operator()
    for name in models:
        kube.put(KIND, resource(name, replicas=0))
    async with serving_kube(kube, folder) as (http, kubeconfig):
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        monkeypatch.setenv("POD_ID", "operator-1")
        runner = KopfRunner(
            ["run", "--all-namespaces", "--quiet"],
            registry=handlers.registry(operator.work),
            settings=handlers.kopf_settings(),
            timeout=SECONDS,
        )
        await asyncio.to_thread(runner.__enter__)
        try:
            yield kube, http, operator
        finally:
            await asyncio.to_thread(runner.__exit__, None, None, None)  # raises what the operator ended by
        assert runner.exit_code == 0


async def until(what: str, look: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not look():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.02)


def children(kube: FakeKube) -> set[tuple[str, str]]:
    found = [(kind, name) for kind, _, name in kube.objects if kind not in (KIND, "Event", "ControllerRevision")]
    return {(kind, name.rpartition("-")[0] if kind == "Secret" else name) for kind, name in found}


def is_ready(kube: FakeKube, name: str = "chat") -> bool:
    conditions = (kube.objects[KIND, "team", name].get("status") or {}).get("conditions") or []
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)


async def at_rest(http: KubeHttp, operator: Operator) -> None:
    """Until some passes in a row have asked nothing."""
    seen, passes = http.asked.total(), operator.quiet_passes

    def calm() -> bool:
        nonlocal seen, passes
        if http.asked.total() != seen:
            seen, passes = http.asked.total(), operator.quiet_passes
        return operator.quiet_passes >= passes + 5

    await until(f"the operator to ask nothing: {http.asked}", calm)


async def test_a_model_is_made_kept_and_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path, monkeypatch, "chat") as (kube, http, operator):
        await until("the children", lambda: children(kube) == CHILDREN and is_ready(kube))
        await at_rest(http, operator)

        kube.remove("Service", "team", "chat")
        await until("the Service to be back", lambda: children(kube) == CHILDREN)
        await at_rest(http, operator)
        labels = kube.objects["Service", "team", "chat"]["metadata"]["labels"]
        removed = labels.pop("lockstep.dev/model")
        await until("the label to be back", lambda: labels_of(kube).get("lockstep.dev/model") == removed)

        kube.put(KIND, resource("code", replicas=0))
        await until("a second model", lambda: is_ready(kube, "code"))
        for item in kube.objects.values():
            assert "finalizers" not in item["metadata"]
            assert not any("kopf" in name for name in item["metadata"].get("annotations") or {})


async def test_a_child_that_nobody_hears_of_any_more_is_looked_at_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without its label no watch shows it: it is missing, until it is to be made."""
    caplog.set_level("INFO", logger="lockstep_operator")
    async with running(tmp_path, monkeypatch, "chat") as (kube, http, operator):
        await until("the children", lambda: children(kube) == CHILDREN and is_ready(kube))
        await at_rest(http, operator)
        labels = clone(labels_of(kube))
        kube.change("Service", "team", "chat", lambda live: live["metadata"]["labels"].pop("lockstep.dev/model"))
        await until("the label to be back", lambda: labels_of(kube) == labels)
        await at_rest(http, operator)
    assert "it is looked at anew" in caplog.text
    assert "reconciling failed" not in caplog.text


async def test_a_name_that_is_free_again_is_told_to_the_model_that_may_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path, monkeypatch, "chat", "chat-0", "cha") as (kube, http, operator):
        await until("the children", lambda: all(is_ready(kube, name) for name in ("chat", "chat-0", "cha")))
        await at_rest(http, operator)
        operator.told.clear()
        kube.remove("Service", "team", "chat-0")
        await until(
            "both to be told", lambda: {*operator.told} >= {ModelKey("team", "chat"), ModelKey("team", "chat-0")}
        )
        assert ModelKey("team", "cha") not in operator.told


def labels_of(kube: FakeKube) -> dict[str, str]:
    found: dict[str, str] = kube.objects["Service", "team", "chat"]["metadata"]["labels"]
    return found


async def test_at_rest_it_asks_nothing_and_when_it_starts_for_lists_and_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"m{number}" for number in range(5)]
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    async with running(first, monkeypatch, *names) as (kube, http, operator):
        await until("all to be Ready", lambda: all(is_ready(kube, name) for name in names))
        await at_rest(http, operator)
        objects = clone_objects(kube)
    async with running(second, monkeypatch) as (kube, http, operator):
        kube.objects.update(objects)
        await until("all to be known", lambda: {key.name for key in operator.told} == {*names})
        await at_rest(http, operator)
        assert kube.writes == []
        writes = {what: count for what, count in http.asked.items() if what[0] != "GET"}
        assert writes == {}


def clone_objects(kube: FakeKube) -> dict[tuple[str, str, str], dict[str, object]]:
    return {identity: clone(item) for identity, item in kube.objects.items()}


async def test_what_was_deleted_while_the_watches_were_broken_is_missed_by_kopf_and_not_by_a_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kopf lists anew and tells of what there is: this is why a pass looks at everything live now and then."""
    monkeypatch.setattr("lockstep_operator.cluster.observe.RESTING_SECONDS", 1.0)
    async with running(tmp_path, monkeypatch, "chat") as (kube, http, _):
        await until("the children", lambda: children(kube) == CHILDREN and is_ready(kube))
        http.break_watches()
        kube.remove("ServiceAccount", "team", "chat-ranks")
        await until("it to be back", lambda: children(kube) == CHILDREN)


async def test_children_of_others_and_of_nobody_are_not_listened_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path, monkeypatch, "chat") as (kube, http, operator):
        await until("the children", lambda: children(kube) == CHILDREN and is_ready(kube))
        await at_rest(http, operator)
        before, lists = len(operator.told), http.asked["GET", "Pod"]
        kube.put("Service", {"metadata": {"name": "theirs", "namespace": "team"}, "spec": {}})
        kube.put("Service", {"metadata": {"name": "mine", "namespace": "team",
                                          "labels": {"lockstep.dev/model": "chat"}}, "spec": {}})  # fmt: skip
        await until("the labelled one to be told of", lambda: len(operator.told) > before)
        assert {*operator.told[before:]} == {ModelKey("team", "chat")}
        await at_rest(http, operator)
        assert http.asked["GET", "Pod"] == lists, "it is another's, and no reason to look"


async def test_somebody_elses_budget_concerns_all_models_of_its_namespace_and_its_status_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path, monkeypatch, "chat") as (kube, http, operator):
        await until("the children", lambda: children(kube) == CHILDREN and is_ready(kube))
        await at_rest(http, operator)
        before = len(operator.told)
        spec = {"minAvailable": 1, "selector": {"matchLabels": {"app": "web"}}}
        kube.put("PodDisruptionBudget", {"metadata": {"name": "theirs", "namespace": "team"}, "spec": spec})
        await until("the model to be looked at", lambda: len(operator.told) > before)
        await at_rest(http, operator)
        told = len(operator.told)
        allowed = {"status": {"disruptionsAllowed": 1}}
        kube.change("PodDisruptionBudget", "team", "theirs", lambda live: live.update(allowed))
        kube.put("Service", {"metadata": {"name": "mine", "namespace": "team",
                                          "labels": {"lockstep.dev/model": "nobody"}}, "spec": {}})  # fmt: skip
        await until("what came after that to be heard", lambda: len(operator.told) > told)
        assert {*operator.told[told:]} == {ModelKey("team", "nobody")}
        kube.remove("Service", "team", "mine")
        selects_all: dict[str, object] = {"selector": {}}
        kube.change("PodDisruptionBudget", "team", "theirs", lambda live: live["spec"].update(selects_all))
        await until("ours to give way", lambda: ("PodDisruptionBudget", "chat") not in children(kube))
        kube.remove("PodDisruptionBudget", "team", "theirs")
        await until("ours to be back", lambda: children(kube) == CHILDREN)


@pytest.mark.parametrize("kind", INDEXED)
def test_every_index_is_fed_by_a_watch_of_what_the_chart_grants(kind: str) -> None:
    from lockstep_operator.cluster.client import RESOURCES
    from lockstep_operator.cluster.permissions import PERMISSIONS

    verbs = {permission.resource: permission.verbs for permission in PERMISSIONS}
    assert {"list", "watch"} <= {*verbs[RESOURCES[kind][1]]}
