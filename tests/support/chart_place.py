"""The chart on an API server of its own, with nothing behind it: objects are kept and judged, no pod runs."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml
from tests.support import kubectl
from tests.support.chart import CHART, LEAST_VALUES, helm
from tests.support.wait import until

SERVED_SECONDS: Final = 30.0

Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ChartPlace:
    """`kubectl` and `helm` of that API server."""

    kubeconfig: Path

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        return kubectl.kubectl(f"--kubeconfig={self.kubeconfig}", *arguments, stdin=stdin)

    def apply(self, document: Object, *options: str) -> str:
        return self.kubectl("apply", "--server-side", *options, "-f", "-", stdin=yaml.safe_dump(document))

    def helm(self, command: str, *options: str, values: Object | None = None) -> subprocess.CompletedProcess[str]:
        """`helm install` or `helm upgrade` of the release lockstep with these values."""
        place = (f"--kubeconfig={self.kubeconfig}", "--namespace=lockstep-system", "--create-namespace")
        chart = ("lockstep", str(CHART), "--values", LEAST_VALUES, "--values", "-")
        return helm(
            command, *(place if command == "install" else place[:2]), *chart, *options, stdin=json.dumps(values or {})
        )

    def must(self, command: str, *options: str, values: Object | None = None) -> None:
        result = self.helm(command, *options, values=values)
        assert result.returncode == 0, result.stderr

    def uninstall(self) -> None:
        result = helm(f"--kubeconfig={self.kubeconfig}", "--namespace=lockstep-system", "uninstall", "lockstep")
        assert result.returncode == 0, result.stderr

    def model(self, version: str) -> Object:
        found: Object = json.loads(
            self.kubectl("get", f"tensorparallelmodels.{version}.lockstep.dev", "chat", "-o=json")
        )
        return found

    def until_served(self, version: str) -> None:
        path = f"/apis/lockstep.dev/{version}/tensorparallelmodels"
        arguments = (f"--kubeconfig={self.kubeconfig}", "get", "--raw", path)
        until(f"{version} to be served", lambda: kubectl.attempt(*arguments).returncode == 0, SERVED_SECONDS)
