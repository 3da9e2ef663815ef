"""A model of a hub: downloaded once by all pods that share a cache, at one commit for all groups, its token unseen."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from dev.cluster.layout import NODE_ADDRESS
from tests.support.cluster_api import ClusterApi
from tests.support.cluster_model import RESOURCES, Model, Object, tiny_chat
from tests.support.fake_hub import COMMIT, FakeHub, fake_hub

NODE = NODE_ADDRESS  # which pods reach
EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-chat"
MOVED = "f" * 40
SECRET = "hf_oneThatNobodyElseMayHave"
ALL_READY_SECONDS = 300.0  # four pods, twice


@pytest.fixture
def hub(folder: Path) -> Iterator[FakeHub]:
    shutil.copytree(EXAMPLE, folder / "repository")
    with fake_hub(folder / "repository", NODE) as hub:
        hub.token = SECRET
        yield hub


def spec_of(hub: FakeHub, cache: Path) -> Object:
    container = {
        "name": "lockstep",
        "resources": RESOURCES,
        "env": [{"name": "HF_ENDPOINT", "value": hub.url}],
    }
    source = {"repo": "org/model", "tokenSecretRef": {"name": "hub", "key": "token"}}
    return tiny_chat(
        model={"huggingFace": source, "cache": {"hostPath": {"path": str(cache)}}},
        replicas=2,
        template={"spec": {"containers": [container]}},
    )


def commits(model: Model) -> set[str]:
    """That the pods were given."""
    arguments = [one for pod in model.pods() for one in pod["spec"]["containers"][0]["args"]]
    return {one.partition("=")[2] for one in arguments if one.startswith("--commit=")}


def test_two_groups_download_once_load_one_commit_and_move_when_asked(
    api: ClusterApi, namespace: str, hub: FakeHub, folder: Path
) -> None:
    cache = folder / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    model = Model(api, namespace, "hub")
    model.kubectl("create", "secret", "generic", "hub", f"--from-literal=token={SECRET}")
    model.apply(spec_of(hub, cache))
    model.until_serving(2, ALL_READY_SECONDS)
    assert model.status()["model"] == {
        "source": "huggingface", "repo": "org/model", "revision": "main", "commit": COMMIT,
    }  # fmt: skip
    assert hub.sent == {path.name: path.stat().st_size for path in EXAMPLE.iterdir()}
    before = {pod["metadata"]["uid"] for pod in model.pods()}
    for pod in model.pods():
        seen = model.kubectl(
            "exec", pod["metadata"]["name"], "--", "sh", "-c", "cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline"
        )
        assert "LOCKSTEP_MODEL_NAME" in seen
        assert SECRET not in seen

    hub.revisions = {"main": MOVED, "old": COMMIT}
    asked = len(hub.asked)
    model.kubectl("delete", "pod", "hub-1-0", "--wait=false")
    model.until("the pod to be another", lambda: {pod["metadata"]["uid"] for pod in model.pods()} != before)
    model.until_serving(2, ALL_READY_SECONDS)
    assert commits(model) == {COMMIT}
    assert len(hub.asked) == asked, "what is pinned and here needs no hub"

    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    model.kubectl("annotate", "tpm", "hub", f"lockstep.dev/resolveRevisionAt={now}")
    model.until(
        "the model to be at the new commit", lambda: model.status().get("model", {}).get("commit") == MOVED,
        ALL_READY_SECONDS,
    )  # fmt: skip
    model.until_serving(2, ALL_READY_SECONDS)
    assert model.status()["model"]["resolveRevisionAt"] == now
    assert hub.sent["model.safetensors"] == (EXAMPLE / "model.safetensors").stat().st_size


def test_a_cluster_without_image_volumes_says_so(api: ClusterApi, namespace: str) -> None:
    model = Model(api, namespace, "image")
    model.apply(tiny_chat(model={"image": {"reference": "registry.example/models/tiny-chat:1"}}))
    words = "this cluster has no image volumes"
    model.until("Ready to say why", lambda: words in model.condition("Ready").get("message", ""))
    assert model.is_true("Stalled")
