"""One deployed operator for all tests; a namespace of its own for each; one served model that several of them ask."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from tests.support import kubectl
from tests.support.cluster_api import ClusterApi
from tests.support.cluster_model import GONE_SECONDS, OPERATOR_NAMESPACE, TINY_CHAT, Model, operator_pods, tiny_chat
from tests.support.cluster_rest import Rest
from tests.support.wait import until

NewNamespace = Callable[[str], str]


@pytest.fixture(scope="session")
def api() -> Iterator[ClusterApi]:
    if not kubectl.KUBECONFIG.exists():
        pytest.fail("there is no cluster: run `make test`, or first `make cluster-up images deploy`")
    api = ClusterApi(kubectl.KUBECONFIG)
    yield api
    api.close()


@pytest.fixture(scope="session")
def new_namespace(api: ClusterApi) -> Iterator[NewNamespace]:
    """Makes namespaces with a name that nobody has; all are gone when the session ends."""
    made: list[str] = []

    def make(purpose: str) -> str:
        name = f"e2e-{purpose}-{secrets.token_hex(3)}"
        kubectl.kubectl("create", "namespace", name)
        made.append(name)
        return name

    yield make
    for name in made:
        kubectl.kubectl("delete", "namespace", name, "--wait=false", "--ignore-not-found")
    until("the tests' pods to be gone", lambda: not any(api.items("pods", name) for name in made), GONE_SECONDS)


@pytest.fixture
def namespace(new_namespace: NewNamespace, request: pytest.FixtureRequest) -> Iterator[str]:
    purpose = request.node.name.removeprefix("test_").partition("[")[0].replace("_", "-")[:40].strip("-")
    name = new_namespace(purpose)
    yield name
    kubectl.kubectl("delete", "namespace", name, "--wait=false", "--ignore-not-found")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of the node that pods' users may read, as pytest's own may not be."""
    folder = Path(tempfile.mkdtemp(prefix="lockstep-e2e-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def operator_stays_healthy(api: ClusterApi) -> Iterator[None]:
    """After every test: the operator was refused nothing and met nothing that it did not expect."""
    began = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    yield
    for pod in operator_pods(api):
        log = api.log(OPERATOR_NAMESPACE, pod["metadata"]["name"], since=began)
        assert not any(_is_suspicious(line) for line in log.splitlines()), f"the operator's log since {began}:\n{log}"


def _is_suspicious(line: str) -> bool:
    """A missing permission ("... is forbidden: User ... cannot ..."), or an exception."""
    return any(word in line for word in ("forbidden: User", "Traceback", "CRITICAL"))


@pytest.fixture(scope="session")
def served(api: ClusterApi, new_namespace: NewNamespace) -> Iterator[Model]:
    """A Ready model in two pods, from a volume, in a namespace that admits nothing but restricted pods.

    Shared by the tests that only look at it and ask it; what they do to it must be mended by it.
    """
    namespace = new_namespace("served")
    kubectl.kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
    claim = _volume(namespace, Path(TINY_CHAT).parent)
    model = Model(api, namespace, "tiny-chat")
    source = {"persistentVolumeClaim": {"claimName": claim, "path": Path(TINY_CHAT).name}}
    model.apply(tiny_chat(model=source | {"servedName": "tiny"}))
    model.until_ready()
    yield model
    model.delete()
    kubectl.kubectl("delete", "persistentvolume", namespace, "--wait=false")


@pytest.fixture(scope="session")
def at_rest(served: Model) -> Rest:
    """The served model before any test has done anything to it: see test_left_alone.py."""
    return Rest.of(served)


def _volume(namespace: str, folder: Path) -> str:
    """A claim bound to a folder of the node: what the restricted profile allows where it forbids hostPath itself."""
    shared: dict[str, Any] = {"accessModes": ["ReadOnlyMany"], "storageClassName": ""}
    kubectl.apply(
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": namespace},
            "spec": shared
            | {
                "capacity": {"storage": "1Gi"},
                "hostPath": {"path": str(folder)},
                "claimRef": {"namespace": namespace, "name": "models"},
            },
        }
    )
    kubectl.apply(
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"namespace": namespace, "name": "models"},
            "spec": shared | {"volumeName": namespace, "resources": {"requests": {"storage": "1Gi"}}},
        }
    )
    return "models"
