"""Changes and upgrades that nobody notices: a model of one group serves throughout, and an upgrade restarts no pod."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Final, Self

import pytest
from tests.support import kubectl
from tests.support.chart import CHART, RELEASE, helm
from tests.support.cluster_api import ClusterApi
from tests.support.cluster_lifecycle import uids, until_groups
from tests.support.cluster_load import Load
from tests.support.cluster_model import OPERATOR_NAMESPACE, Model, tiny_chat

NewNamespace = Callable[[str], str]
SAMPLE_SECONDS: Final = 0.1
CLIENTS: Final = 8


@pytest.fixture(scope="module")
def lone(api: ClusterApi, new_namespace: NewNamespace) -> Iterator[Model]:
    """A model of one group, which another may stand in for."""
    model = Model(api, new_namespace("lone"), "lone")
    model.apply(tiny_chat(rollout={"maxSurge": 1, "maxUnavailable": 0}))
    model.until_ready()
    yield model
    model.delete()


class Samples:
    """Ten times a second: how many leaders are Ready, and how many groups there are."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.leaders: list[int] = []
        self.groups: list[int] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=30)

    def _look(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.leaders.append(sum(_is_ready_leader(pod) for pod in self._model.pods()))
            self.groups.append(len(self._model.children("statefulsets")))


def _is_ready_leader(pod: dict[str, Any]) -> bool:
    conditions = pod.get("status", {}).get("conditions", [])
    ready = any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)
    return ready and pod["metadata"]["labels"]["apps.kubernetes.io/pod-index"] == "0"


def test_a_change_of_a_lone_group_is_noticed_by_nobody(lone: Model) -> None:
    before = uids(lone)
    with Load(lone, CLIENTS) as load, Samples(lone) as samples:
        lone.kubectl("patch", "tpm", lone.name, "--type=merge", "-p", '{"spec": {"engine": {"maxSequences": 12}}}')
        lone.until("the change to be rolled out", lambda: lone.is_true("Ready") and not before & uids(lone), 240)
        until_groups(lone, 1)

    assert load.failures == []
    assert load.answered > CLIENTS
    assert len(load.texts) == 1, "the same answer from every group"
    assert min(samples.leaders) >= 1, f"of {len(samples.leaders)} samples"
    assert max(samples.groups) == 2


@pytest.fixture
def upgraded(lone: Model) -> Iterator[None]:
    """Another runtime's tag, which is nowhere to be had, and pods with one variable more; until the test has ended."""
    _upgrade("--set=runtimeImage.tag=next", "--set=logFormat=json")
    yield
    _upgrade("--set=runtimeImage.tag=" + _tag(lone), "--set=logFormat=text")


def _upgrade(*values: str) -> None:
    where = (f"--kubeconfig={kubectl.KUBECONFIG}", f"--namespace={OPERATOR_NAMESPACE}")
    done = helm(
        "upgrade", RELEASE, str(CHART), *where, "--reuse-values", *values, "--wait", "--timeout=120s", timeout=150
    )
    assert done.returncode == 0, done.stderr


def _tag(model: Model) -> str:
    image: str = model.pod(0, 0)["spec"]["containers"][0]["image"]
    return image.rpartition(":")[2]


def test_an_upgrade_restarts_no_pod_and_says_that_there_is_something_newer(lone: Model, upgraded: None) -> None:
    before = uids(lone)
    lone.until("the model to be outdated", lambda: bool(lone.status()["runtime"]["outdated"]), 90)
    lone.kubectl("delete", "pod", f"{lone.name}-0-1", "--wait=false")
    lone.until("the pod to be replaced", lambda: len(uids(lone) - before) == 1 and lone.is_true("Ready"))
    assert len(before & uids(lone)) == 1, "the other pod is the one that it was"
    assert {_image(pod) for pod in lone.pods()} == {lone.status()["runtime"]["image"]}
    assert not lone.status()["runtime"]["image"].endswith(":next")

    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    lone.kubectl("annotate", "--overwrite", "tpm", lone.name, f"lockstep.dev/update-runtime={now}")
    lone.until("a group with the newer runtime", lambda: any(_image(pod).endswith(":next") for pod in lone.pods()), 60)
    assert lone.is_true("Available"), "it can't be pulled, so the group that serves stays"
    older = str(lone.pod(0, 0)["metadata"]["labels"]["lockstep.dev/revision"])
    lone.kubectl("annotate", "tpm", lone.name, f"lockstep.dev/rollback-to={older}")
    lone.until("the undo", lambda: lone.condition("Ready").get("reason") == "RolledBack", 120)
    until_groups(lone, 1)


def _image(pod: dict[str, Any]) -> str:
    return str(next(one["image"] for one in pod["spec"]["containers"] if one["name"] == "lockstep"))
