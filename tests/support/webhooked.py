"""A controller with webhooks on a cluster of a test's own, as a process of this machine, with its chart's objects.

The chart is of the Go module that the program is built from, and its Deployment is left out. The webhooks' Service
leads to this machine, and what a kubelet does with the Secret of their certificate is done here.
"""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml
from dev.cluster import toolchain
from dev.go_tool import TOOLS
from tests.support import kubectl
from tests.support.control_plane import ControlPlane

Object = dict[str, Any]

HELM: Final = kubectl.ROOT / ".dev" / "bin" / "helm"


@dataclass(frozen=True, slots=True)
class Webhooked:
    """`tool` is in dev/tools; `module`, the Go module it is of, has a chart of the tool's name. `secret` and `service`
    are the webhooks'."""

    tool: str
    module: str
    namespace: str
    secret: str
    service: str

    @property
    def program(self) -> Path:
        return kubectl.ROOT / ".dev" / "bin" / self.tool

    def install(self, plane: ControlPlane, kinds: Collection[str], port: int) -> None:
        """Of the chart's objects those of these kinds. The webhooks are at `port` of this machine."""
        plane.kubectl("create", "namespace", self.namespace)
        plane.apply(self._service(), *(_leading_to(port, one) for one in self._chart() if one["kind"] in kinds))

    def mounted(self, plane: ControlPlane, folder: Path) -> bool:
        """Whether there is a certificate, which lies in the folder then."""
        data = plane.get("secret", self.secret, f"--namespace={self.namespace}").get("data", {})
        for name in ("tls.crt", "tls.key"):
            if name not in data:
                return False
            (folder / name).write_bytes(base64.b64decode(data[name]))
        return True

    def _chart(self) -> list[Object]:
        folder = Path(_go(self.tool, "mod", "download", "-json", self.module)["Dir"])
        chart = str(folder / "charts" / self.tool)
        command = [str(HELM), "template", self.tool, chart, f"--namespace={self.namespace}", "--include-crds"]
        rendered = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        return [document for document in yaml.safe_load_all(rendered) if document]

    def _service(self) -> Object:
        """The API server calls webhooks by their Service, whose name is in the certificate."""
        metadata = {"name": self.service, "namespace": self.namespace}
        spec = {"type": "ExternalName", "externalName": "localhost"}
        return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}


def _leading_to(port: int, document: Object) -> Object:
    """The same, with every webhook at this port of the Service."""
    conversion = document.get("spec", {}).get("conversion", {}).get("webhook")
    for webhook in [*document.get("webhooks", []), *([conversion] if conversion else [])]:
        webhook["clientConfig"]["service"]["port"] = port
    return document


def _go(tool: str, *arguments: str) -> Object:
    go = toolchain.find_go() or toolchain.install_go()
    output = subprocess.run([go, *arguments], cwd=TOOLS / tool, capture_output=True, check=True, timeout=120).stdout
    found: Object = json.loads(output)
    return found
