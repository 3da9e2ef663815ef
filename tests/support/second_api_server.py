"""A second API server of the embedded cluster, whose objects are its own: what is done to its CRDs harms nobody.

It is the cluster's, with its certificates and its etcd, but for the prefix of all its keys. Nothing runs behind it.
"""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import yaml
from dev.cluster.components import foundation
from tests.support import kubectl
from tests.support.ports import free_port
from tests.support.wait import until

UP_SECONDS: Final = 60.0
DOWN_SECONDS: Final = 30.0


@contextmanager
def second_api_server(folder: Path) -> Iterator[Path]:
    """Its kubeconfig, once it serves; `folder` is for that and the log."""
    port, log, kubeconfig = free_port(), folder / "api-server.log", folder / "kubeconfig"
    command = [
        *foundation()["kube-apiserver"],
        "--bind-address=127.0.0.1",
        f"--secure-port={port}",
        f"--etcd-prefix=/second-{secrets.token_hex(4)}",
        "--etcd-compaction-interval=0",  # the first one's business
        "--endpoint-reconciler-type=none",
    ]
    _write_kubeconfig(kubeconfig, f"https://127.0.0.1:{port}")
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as server:
        try:
            until("the second API server", lambda: _is_up(kubeconfig), UP_SECONDS, lambda: log.read_text()[-4000:])
            yield kubeconfig
        finally:
            server.terminate()
            try:
                server.wait(DOWN_SECONDS)
            finally:
                server.kill()


def _write_kubeconfig(path: Path, url: str) -> None:
    config = yaml.safe_load(kubectl.KUBECONFIG.read_text())
    config["clusters"][0]["cluster"]["server"] = url
    path.touch(0o600)
    path.write_text(yaml.safe_dump(config))


def _is_up(kubeconfig: Path) -> bool:
    """Ready, and with the namespace that it makes for itself."""
    ready = kubectl.attempt(f"--kubeconfig={kubeconfig}", "get", "--raw", "/readyz")
    return ready.stdout == "ok" and "default" in kubectl.attempt(f"--kubeconfig={kubeconfig}", "get", "ns").stdout
