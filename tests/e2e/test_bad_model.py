"""A model that can't be loaded says why where people look, and serves as soon as the cause is mended."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.support import kubectl
from tests.support.cluster_api import ClusterApi
from tests.support.cluster_lifecycle import change_spec
from tests.support.cluster_model import TINY_CHAT, Model, tiny_chat

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-chat"


def test_a_truncated_file_is_named_until_it_is_whole(api: ClusterApi, namespace: str, folder: Path) -> None:
    shutil.copytree(EXAMPLE, folder, dirs_exist_ok=True)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    model = Model(api, namespace, "cut-short")
    model.apply(tiny_chat(tensorParallelSize=1, model={"hostPath": {"path": str(folder)}}))

    model.until("the file's name in ModelLoaded", lambda: "model.safetensors" in _said(model))
    said = _said(model)
    assert model.condition("ModelLoaded")["status"] == "False"
    assert not model.is_true("Ready")
    assert not model.is_true("Available")
    assert said in kubectl.describe(namespace, "tpm", "cut-short")
    assert [rank["message"] for rank in model.status()["groups"][0]["ranks"] if rank.get("message")]

    weights.write_bytes(whole)
    model.until_ready()
    assert model.is_true("ModelLoaded")


def test_one_mistake_after_the_other_is_mended_in_the_spec(api: ClusterApi, namespace: str) -> None:
    model = Model(api, namespace, "astray")
    path = TINY_CHAT.replace("chat", "chta")
    model.apply(tiny_chat(tensorParallelSize=3, ranksPerPod=3, model={"hostPath": {"path": path}}))

    model.until("the missing folder's name", lambda: "tiny-chta" in model.condition("Ready").get("message", ""), 60)
    assert not model.is_true("ModelLoaded")

    change_spec(model, f'{{"spec": {{"model": {{"hostPath": {{"path": "{TINY_CHAT}"}}}}}}}}')
    model.until("the sizes that fit in ModelLoaded", lambda: "over 3 ranks; it can over 1, 2" in _said(model))
    assert model.condition("ModelLoaded")["status"] == "False"

    change_spec(model, '{"spec": {"tensorParallelSize": 2, "ranksPerPod": 2}}')
    model.until_ready()


def _said(model: Model) -> str:
    message: str = model.condition("ModelLoaded").get("message", "")
    return message
