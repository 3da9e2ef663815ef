"""Every status that a model has had since the watch began (`kubectl get --watch`): a look now and then misses some."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from tests.support import kubectl
from tests.support.cluster_model import Model, Object

END_SECONDS: Final = 10.0


class StatusWatch:
    """What was seen so far, in order. The end may be a document that isn't whole yet."""

    def __init__(self, path: str) -> None:
        self._path = path

    def models(self) -> list[Object]:
        with open(self._path) as file:  # noqa: PTH123 - written by the child while it is read
            text = file.read()
        found: list[Object] = []
        decoder, position = json.JSONDecoder(), 0
        while position < len(text):
            try:
                document, position = decoder.raw_decode(text, position)
            except ValueError:
                break
            found.append(document)
            position += len(text[position:]) - len(text[position:].lstrip())
        return found

    def conditions(self, kind: str) -> list[dict[str, Any]]:
        """The condition in each status, those of an older generation of the spec left out."""
        return [
            condition
            for model in self.models()
            for condition in model.get("status", {}).get("conditions", [])
            if condition["type"] == kind and condition["observedGeneration"] == model["metadata"]["generation"]
        ]

    def never_stalled(self) -> bool:
        return not any(condition["status"] == "True" for condition in self.conditions("Stalled"))


@contextmanager
def watched(model: Model) -> Iterator[StatusWatch]:
    program = str(kubectl.OWN_KUBECTL) if kubectl.OWN_KUBECTL.exists() else "kubectl"
    command = [program, f"--kubeconfig={kubectl.KUBECONFIG}", "-n", model.namespace, "get", "tpm", model.name]
    with tempfile.NamedTemporaryFile() as file:
        process = subprocess.Popen([*command, "--watch", "-o", "json"], stdout=file, stderr=subprocess.DEVNULL)
        try:
            yield StatusWatch(file.name)
        finally:
            process.terminate()
            process.wait(END_SECONDS)
