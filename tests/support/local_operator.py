"""Operators as processes of this machine: killed and replaced in a tenth of a second, where a pod takes several.

A fork server has the operator's code in memory, so that a new one needs no two seconds of imports. A process that is
started is the program `lockstep-operator` with the deployed one's settings, in the namespaces that it is given.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Final

import yaml
from tests.support.ports import free_port

Object = dict[str, Any]

END_SECONDS: Final = 10.0
CONTEXT: Final = multiprocessing.get_context("forkserver")
# A new process also imports the main program again, which is pytest.
CONTEXT.set_forkserver_preload(["pytest", "lockstep_operator.__main__", __name__])


class LocalOperator:
    """Not safe for several threads at once. `namespaces` are comma-separated, `folder` is for kubeconfig and log."""

    def __init__(self, server: str, namespaces: str, deployed: Mapping[str, str], folder: Path) -> None:
        folder.mkdir(parents=True)
        kubeconfig, self._log = folder / "kubeconfig", folder / "log"
        kubeconfig.write_text(yaml.safe_dump(_kubeconfig(server)))
        self._environment = {
            **deployed,
            "KUBECONFIG": str(kubeconfig),
            "LOCKSTEP_NAMESPACES": namespaces,
            "LOCKSTEP_LEASE": "",  # that is the deployed operators'
            "LOCKSTEP_PORT": str(free_port()),
            "LOCKSTEP_LIVE_PORT": str(free_port()),
            "NO_PROXY": "127.0.0.1",
        }
        self._process: ForkServerProcess | None = None

    @property
    def url(self) -> str:
        """Of /metrics, /healthz and /readyz."""
        return f"http://127.0.0.1:{self._environment['LOCKSTEP_PORT']}"

    @property
    def live_url(self) -> str:
        """Of its live page."""
        return f"http://127.0.0.1:{self._environment['LOCKSTEP_LIVE_PORT']}"

    def start(self) -> None:
        self._process = CONTEXT.Process(target=_live, args=(self._environment, str(self._log)))
        self._process.start()

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.join(END_SECONDS)
            process.close()

    def replace(self) -> None:
        self.kill()
        self.start()

    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""


def deployed_settings(deployment: Object) -> dict[str, str]:
    """The environment that the deployed operator's container gets: with the same, the same pods are wanted."""
    metadata, pod = deployment["metadata"], deployment["spec"]["template"]["spec"]
    variables = {variable["name"]: variable.get("value") for variable in pod["containers"][0]["env"]}
    return {name: metadata["namespace"] if value is None else value for name, value in variables.items()}


def deployed_user(deployment: Object) -> str:
    """As the API server knows the deployed operator."""
    account = deployment["spec"]["template"]["spec"]["serviceAccountName"]
    return f"system:serviceaccount:{deployment['metadata']['namespace']}:{account}"


def _kubeconfig(server: str) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "proxy",
        "clusters": [{"name": "proxy", "cluster": {"server": server}}],
        "contexts": [{"name": "proxy", "context": {"cluster": "proxy", "user": "nobody"}}],
        "users": [{"name": "nobody", "user": {"token": "unused"}}],
    }


def _live(environment: dict[str, str], log: str) -> None:
    """In the new process."""
    from lockstep_operator.__main__ import main

    threading.Thread(target=_end_with_parent, daemon=True).start()
    with Path(log).open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    sys.argv = ["lockstep-operator"]
    main()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
