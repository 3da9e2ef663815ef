"""An image conversation through the Service equals transformers' processor and model."""

from __future__ import annotations

from pathlib import Path

from tests.support.cluster_api import ClusterApi
from tests.support.cluster_model import Model, tiny_chat
from tests.support.image_chat import check_seen
from tests.support.vision import picture
from tests.support.vision_model import write_vision_model


def test_images_are_seen_as_transformers_sees_them(api: ClusterApi, namespace: str, folder: Path) -> None:
    write_vision_model(folder)
    model = Model(api, namespace, "eyes")
    model.apply(tiny_chat(model={"hostPath": {"path": str(folder)}}))
    model.until_ready()
    with model.client() as client:
        check_seen(client, model.served(), folder, [picture(64, 48)])
        check_seen(client, model.served(), folder, [picture(100, 40, 1), picture(33, 33, 2)])
